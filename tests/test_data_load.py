"""Calibration data for every kind of model, from every kind of source."""

from __future__ import annotations

import json
import random

import datasets
import numpy
import pytest
import torch
from test_data_models import (
    WORDS,
    bart,
    bert_config,
    build,
    byte_tokenizer,
    llama,
    llama_config,
    t5,
    target_tokenizer,
    word_tokenizer,
)
from tokenizers import processors
from transformers import BertForSequenceClassification, BertModel, LlamaForSequenceClassification

from eckart.data import Batch, digest_rows, load_data
from eckart.data import source as source_module
from eckart.data.hub import open_hub
from eckart.errors import DataError, NumericalError, UsageError


def sentences(count, seed=0):
    pick = random.Random(seed)
    return [" ".join(pick.choices(WORDS, k=pick.randint(2, 9))) for _ in range(count)]


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.examples == b.examples
        assert a.inputs.keys() == b.inputs.keys()
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)


def all_ids(data):
    return torch.cat([batch.inputs["input_ids"] for batch in data])


BYTES = byte_tokenizer()
WITH_BOS = byte_tokenizer(bos=True)
CAUSAL = {"tokenizer": BYTES, "model_config": llama_config()}
ENCODER = {"tokenizer": word_tokenizer(), "model_config": bert_config()}


# -- causal -------------------------------------------------------------------------------------------------------


def test_text_file_is_packed_whole(tmp_path):
    path = tmp_path / "a.txt"
    text = "".join(f"line {n}\n" for n in range(40))
    path.write_text(text)
    data = load_data(path, **CAUSAL, max_seq_length=16, batch_size=4)
    expected = BYTES(text, add_special_tokens=False)["input_ids"]
    windows = len(expected) // 16
    places = [place for batch in data for place in batch.examples]
    assert all_ids(data)[torch.tensor(places).argsort()].flatten().tolist() == expected[: windows * 16]
    assert places != sorted(places), "a part of the batches is from the whole text"
    assert places != [p for batch in load_data(path, **CAUSAL, max_seq_length=16, seed=1) for p in batch.examples]
    assert [batch.inputs["input_ids"].shape[0] for batch in data] == [4] * (windows // 4) + [windows % 4][: windows % 4]
    assert data.num_examples == windows
    assert data.num_tokens == windows * 16
    assert not data.has_labels
    for batch in data:
        assert set(batch.inputs) == {"input_ids", "attention_mask"}
        assert list(batch.masks()) == [16]
        assert batch.masks()[16].all()
    assert json.loads(json.dumps(data.description)) == data.description
    assert data.description["read_whole"]
    assert len(data.description["sha256"]) == 64
    same(data, data)  # it can be gone through again


def test_windows_are_drawn_evenly_by_seed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(97 + n % 26) for n in range(5000)))
    settings = dict(**CAUSAL, max_seq_length=16, num_samples=30)
    one, again, other = load_data(path, **settings), load_data(path, **settings), load_data(path, **settings, seed=1)
    same(one, again)
    assert one.description == again.description
    places = [example for batch in one for example in batch.examples]
    assert len(set(places)) == 30
    assert max(places) > 200
    assert places != [example for batch in other for example in batch.examples]
    stream = torch.tensor(BYTES(path.read_text(), add_special_tokens=False)["input_ids"])
    for batch in one:
        for row, place in zip(batch.inputs["input_ids"], batch.examples, strict=True):
            assert torch.equal(row, stream[place * 16 : (place + 1) * 16])


def test_batch_size_changes_nothing_but_the_batches(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc" * 500)
    small, large = (load_data(path, **CAUSAL, max_seq_length=16, num_samples=9, batch_size=size) for size in (2, 9))
    assert torch.equal(all_ids(small), all_ids(large))


def test_documents_are_parted_by_eos_and_started_by_bos():
    texts = ["ab", "cd"]
    without = all_ids(load_data(texts, **CAUSAL, max_seq_length=5)).flatten().tolist()
    assert sorted(token for token in without if token > 2) == sorted(BYTES("abcd")["input_ids"])
    assert without.count(1) == 1
    assert without[2] == 1
    started = load_data(texts, tokenizer=WITH_BOS, model_config=llama_config(), max_seq_length=7)
    ids = all_ids(started).flatten().tolist()
    assert ids[0] == 0
    assert ids[3:5] == [1, 0]


def test_too_little_text_gives_one_shorter_window(caplog):
    data = load_data(["abcde"], **CAUSAL, max_seq_length=16)
    assert data.batches[0].inputs["input_ids"].shape == (1, 5)
    assert "5 tokens" in caplog.text
    assert data.description["warnings"]
    load_data(["a" * 40], **CAUSAL, max_seq_length=16, num_samples=4)
    assert "2 windows of 16 tokens, 4 were asked for" in caplog.text
    load_data(["a" * 40], **CAUSAL, max_seq_length=16)
    assert "2 windows of 16 tokens; 128 are read where there are" in caplog.text
    caplog.clear()
    load_data(["a" * 40], **CAUSAL, max_seq_length=16, num_samples=2, extra_samples=2)
    assert "windows" not in caplog.text


def test_fewer_texts_than_wanted_are_told_as_fewer_windows_are(caplog):
    texts = ["ab cd"] * 5
    data = load_data(texts, **ENCODER, num_samples=8)
    assert data.description["warnings"] == ["data: 5 texts, 8 were asked for"]
    assert "data: 5 texts, 8 were asked for" in caplog.text
    assert load_data(texts, **ENCODER).description["warnings"] == ["data: 5 texts; 1,024 are read where there are"]
    assert "warnings" not in load_data(texts, **ENCODER, num_samples=5, extra_samples=3).description


@pytest.mark.parametrize("empty", [[], [""], ["", ""]])
def test_no_text_is_refused(empty):
    with pytest.raises(DataError, match="pass data"):
        load_data(empty, **CAUSAL)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"a\.txt"):
        load_data(tmp_path / "a.txt", **CAUSAL)


def test_reading_stops_when_there_is_enough():
    drawn = []

    def endless():
        while True:
            drawn.append(1)
            yield {"text": "some text " * 3}

    stream = datasets.IterableDataset.from_generator(endless)
    data = load_data(stream, **CAUSAL, max_seq_length=16, num_samples=4)
    assert data.num_examples == 4
    assert len(drawn) < 5000


def test_length_never_exceeds_the_positions(caplog):
    data = load_data(["abc" * 100], **CAUSAL, max_seq_length=1000)
    assert data.batches[0].inputs["input_ids"].shape[1] == 64
    assert "lowered to 64" in caplog.text


def test_chat_messages_go_through_the_template():
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    tokenizer = byte_tokenizer(bos=True, template=template)
    for data in ([{"messages": chat, "id": 3}], [chat], datasets.Dataset.from_list([{"messages": chat}])):
        ids = all_ids(load_data(data, tokenizer=tokenizer, model_config=llama_config(), max_seq_length=27))
        assert tokenizer.decode(ids[0]) == "<s>[user] hi[assistant] hello"[: 27 + 2]
        assert ids[0].tolist().count(0) == 1
    with pytest.raises(DataError, match=r"'messages' holds chat messages.*chat_template"):
        load_data([chat], **CAUSAL)


def test_rows_of_a_dataset_and_of_a_dataset_dict():
    table = datasets.Dataset.from_dict({"id": [1, 2], "body": ["abcd", "efgh"]})
    ids = all_ids(load_data(table, **CAUSAL, max_seq_length=9)).flatten().tolist()
    assert ids == all_ids(load_data(datasets.DatasetDict(train=table), **CAUSAL, max_seq_length=9)).flatten().tolist()
    with pytest.raises(DataError, match=r"no split 'test'.*train"):
        load_data(datasets.DatasetDict(train=table), **CAUSAL, split="test")


def test_a_large_dataset_is_read_in_random_order(monkeypatch):
    monkeypatch.setattr(source_module, "SHUFFLE_ABOVE", 10)
    table = datasets.Dataset.from_dict({"text": sentences(200)})
    data = load_data(table, **ENCODER, num_samples=20)
    chosen = sorted(example for batch in data for example in batch.examples)
    assert len(set(chosen)) == 20
    assert max(chosen) > 50
    rows = {
        example: row for batch in data for row, example in zip(batch.inputs["input_ids"], batch.examples, strict=True)
    }
    for example, row in rows.items():
        expected = ENCODER["tokenizer"](table[example]["text"], padding=False, truncation=False)["input_ids"]
        assert row[: len(expected)].tolist() == expected


def test_stdlib_is_there():
    data = load_data("stdlib", **CAUSAL, max_seq_length=64, num_samples=8)
    assert data.num_tokens == 8 * 64
    assert data.description["source"] == "stdlib"
    assert data.description["split"] == "calibration"


# -- text that the model writes itself ----------------------------------------------------------------------------


def test_self_is_deterministic_and_keyed_by_example():
    model = llama()
    model.train()
    state = torch.random.get_rng_state()
    settings = {"tokenizer": BYTES, "model": model, "max_seq_length": 12, "disable": True}
    data = load_data("self", **settings, num_samples=40)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert all(module.training for module in model.modules())
    same(data, load_data("self", **settings, num_samples=40))
    # Window 33 is the same whether 40 or 34 are drawn, and however many side by side.
    assert torch.equal(all_ids(data)[:34], all_ids(load_data("self", **settings, num_samples=34)))
    assert not torch.equal(all_ids(data), all_ids(load_data("self", **settings, num_samples=40, seed=1)))
    assert (all_ids(data)[:, 0] == 0).all()
    assert data.description["source"] == "self"


def test_self_samples_the_models_own_distribution():
    model = llama(vocab_size=8, bos_token_id=0, eos_token_id=None, pad_token_id=None)
    model.generation_config.repetition_penalty = 5.0  # for answering: must not bend the samples
    model.generation_config.max_new_tokens = 3
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    data = load_data("self", tokenizer=tokenizer, model=model, num_samples=2000, max_seq_length=3, disable=True)
    ids = all_ids(data)
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[0]])).logits[0, -1].softmax(-1)
        joint = first[:, None] * torch.stack(
            [model(input_ids=torch.tensor([[0, token]])).logits[0, -1].softmax(-1) for token in range(8)]
        )
    counted = torch.zeros(8, 8)
    for _, a, b in ids.tolist():
        counted[a, b] += 1
    assert (counted / 2000 - joint).abs().max() < 0.035
    assert model.generation_config.repetition_penalty == 5.0


def test_self_without_bos_starts_from_what_is_frequent():
    model = llama(bos_token_id=None)
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    data = load_data("self", tokenizer=tokenizer, model=model, num_samples=5, max_seq_length=10, disable=True)
    assert all_ids(data).shape == (5, 10)
    assert len(set(all_ids(data)[:, 0].tolist())) > 1


def test_self_goes_on_after_eos_with_bos():
    model = llama(vocab_size=4, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    ids = all_ids(load_data("self", tokenizer=BYTES, model=model, num_samples=20, max_seq_length=30, disable=True))
    ends = (ids[:, :-1] == 1).nonzero()
    assert len(ends)
    assert all(ids[row, place + 1] == 0 for row, place in ends.tolist())


def test_self_is_refused_where_it_cannot_work():
    bert = build(BertModel, bert_config())
    with pytest.raises(UsageError, match=r"only a causal model.*pass a file"):
        load_data("self", tokenizer=word_tokenizer(), model=bert)
    with pytest.raises(UsageError, match="pass the model"):
        load_data("self", **CAUSAL)
    with pytest.raises(UsageError, match="AutoModelForCausalLM"):
        load_data("self", tokenizer=BYTES, model=llama().model)
    broken = llama()
    broken.lm_head.weight.data[3, 3] = torch.nan
    own = broken.generation_config
    with pytest.raises(NumericalError, match="not finite"):
        load_data("self", tokenizer=BYTES, model=broken, max_seq_length=8, disable=True)
    assert broken.generation_config is own


# -- encoders -----------------------------------------------------------------------------------------------------


def test_one_example_a_line_padded_by_batch(tmp_path):
    lines = sentences(20)
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(lines))  # every other line is blank
    data = load_data(path, **ENCODER, batch_size=6)
    seen = {}
    for batch in data:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert ids.shape[1] == mask.sum(1).max()
        assert (ids[mask == 0] == 0).all()
        assert torch.equal(batch.masks()[ids.shape[1]], mask.bool())
        assert "token_type_ids" in batch.inputs
        for row, real, example in zip(ids, mask, batch.examples, strict=True):
            seen[example] = ENCODER["tokenizer"].decode(row[real.bool()][1:-1])
    assert seen == {2 * n: line for n, line in enumerate(lines)}
    lengths = [batch.inputs["input_ids"].shape[1] for batch in data]
    assert lengths == sorted(lengths, reverse=True)
    assert data.num_tokens == sum(len(line.split()) + 2 for line in lines)


def test_examples_keep_their_place_when_drawn():
    lines = sentences(50)
    data = load_data(lines, **ENCODER, num_samples=10, seed=3)
    same(data, load_data(lines, **ENCODER, num_samples=10, seed=3))
    for batch in data:
        for row, mask, example in zip(
            batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.examples, strict=True
        ):
            assert ENCODER["tokenizer"].decode(row[mask.bool()][1:-1]) == lines[example]


def test_long_texts_are_cut_at_the_models_positions():
    data = load_data([" ".join(["cat"] * 100)], **ENCODER)
    assert data.batches[0].inputs["input_ids"].shape == (1, 32)
    build(BertModel, bert_config())(**data.batches[0].inputs)
    short = load_data([" ".join(["cat"] * 100)], **ENCODER, max_seq_length=7)
    assert short.batches[0].inputs["input_ids"].shape == (1, 7)


def test_sentence_pairs():
    rows = [{"a": "the cat", "b": "a dog sat"}, {"a": "it", "b": "was"}]
    data = load_data(rows, **ENCODER, column="a", target_column="b")
    batch = data.batches[0]
    assert batch.inputs["token_type_ids"][batch.examples.index(0)].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    with pytest.raises(DataError, match="no column 'c'"):
        load_data(rows, **ENCODER, column="a", target_column="c")


def test_own_labels():
    rows = [{"text": text, "label": label} for text, label in zip(sentences(9), "pnppnnpnp", strict=True)]
    config = bert_config(num_labels=2, label2id={"n": 0, "p": 1}, id2label={0: "n", 1: "p"})
    model = build(BertForSequenceClassification, config)
    data = load_data(rows, tokenizer=word_tokenizer(), model=model, label_column="label", batch_size=4)
    assert data.has_labels
    for batch in data:
        assert batch.inputs["labels"].tolist() == [int(rows[example]["label"] == "p") for example in batch.examples]
        assert torch.isfinite(model(**batch.inputs).loss)
    with pytest.raises(DataError, match=r"item 8: label 'x'.*label2id"):
        load_data(
            [*rows[:8], {"text": "cat", "label": "x"}], tokenizer=word_tokenizer(), model=model, label_column="label"
        )
    with pytest.raises(DataError, match=r"item 0: label 2.*2 classes"):
        load_data([{"text": "cat", "label": 2}], tokenizer=word_tokenizer(), model=model, label_column="label")
    score = build(BertForSequenceClassification, bert_config(num_labels=1))
    data = load_data([{"text": "cat", "label": 3}], tokenizer=word_tokenizer(), model=score, label_column="label")
    assert data.batches[0].inputs["labels"].dtype == torch.float32
    assert torch.isfinite(score(**data.batches[0].inputs).loss)


def test_a_classifier_on_a_causal_backbone_reads_separate_texts():
    model = build(LlamaForSequenceClassification, llama_config(num_labels=2))
    rows = [{"text": "abc", "label": 1}, {"text": "defgh", "label": 0}]
    data = load_data(rows, tokenizer=BYTES, model=model, label_column="label")
    assert data.batches[0].examples == (1, 0)
    assert data.batches[0].inputs["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert torch.isfinite(model(**data.batches[0].inputs).loss)


# -- encoder-decoders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [t5, bart], ids=["t5", "bart"])
def test_source_and_target(make):
    model, tokenizer = make(), target_tokenizer()
    rows = [{"source": text, "target": goal} for text, goal in zip(sentences(12), sentences(12, 1), strict=True)]
    data = load_data(rows, tokenizer=tokenizer, model=model, column="source", target_column="target", batch_size=5)
    assert data.has_labels
    for batch in data:
        inputs = batch.inputs
        masks = batch.masks()
        assert len(masks) == 2
        assert torch.equal(masks[inputs["input_ids"].shape[1]], inputs["attention_mask"].bool())
        decoder = masks[inputs["decoder_input_ids"].shape[1]]
        assert torch.equal(decoder, inputs["decoder_attention_mask"].bool())
        for row, example in enumerate(batch.examples):
            goal = tokenizer(rows[example]["target"])["input_ids"]
            assert inputs["labels"][row][decoder[row]].tolist() == goal
            start = model.config.decoder_start_token_id
            assert inputs["decoder_input_ids"][row][decoder[row]].tolist() == [start, *goal[:-1]]
        # What the loader made is what the model makes of the labels.
        with torch.no_grad():
            both = model.eval()(**inputs).logits[decoder]
            plain = {k: v for k, v in inputs.items() if k not in ("decoder_input_ids",)}
            assert torch.allclose(both, model(**plain).logits[decoder], atol=1e-5)


@pytest.mark.parametrize("rows", [[("a", "")], [("the cat", "the dog"), ("a", "")]], ids=["alone", "among others"])
def test_a_target_without_a_token_is_named(rows, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(["source,target", *(f"{text},{goal}" for text, goal in rows)]))
    tokenizer = target_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    with pytest.raises(DataError, match=r"rows.csv.*: the target holds no token \(1 such rows\)"):
        load_data(str(file), tokenizer=tokenizer, model=t5(), column="source", target_column="target")


@pytest.mark.parametrize("make", [t5, bart], ids=["t5", "bart"])
def test_the_configuration_alone_gives_the_same(make):
    rows = [{"source": text, "target": goal} for text, goal in zip(sentences(12), sentences(12, 1), strict=True)]
    settings = {"tokenizer": target_tokenizer(), "column": "source", "target_column": "target"}
    same(load_data(rows, **settings, model=make()), load_data(rows, **settings, model_config=make().config))


def test_equal_lengths_are_told_apart():
    rows = [{"s": "the cat sat", "t": "a dog ran"}]
    batch = load_data(rows, tokenizer=target_tokenizer(), model=t5(), column="s", target_column="t").batches[0]
    assert batch.inputs["input_ids"].shape[1] == 4
    assert batch.inputs["decoder_input_ids"].shape[1] == 5
    assert batch.masks()[5].tolist() == [[True] * 4 + [False]]
    assert batch.inputs["labels"][0, -1] == -100


def test_without_a_target_the_text_is_cut_in_two():
    data = load_data(["the cat sat on the mat"], tokenizer=target_tokenizer(), model=t5())
    inputs = data.batches[0].inputs
    tokenizer = target_tokenizer()
    assert not data.has_labels
    assert tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True) == "the cat sat"
    decoder = inputs["decoder_input_ids"][0][inputs["decoder_attention_mask"][0].bool()]
    assert tokenizer.decode(decoder[1:]) == "on the mat"
    t5()(**inputs)


def test_sides_stay_within_the_positions():
    long = " ".join(["cat"] * 300)
    model = bart()
    data = load_data([{"s": long, "t": long}], tokenizer=target_tokenizer(), model=model, column="s", target_column="t")
    inputs = data.batches[0].inputs
    assert inputs["input_ids"].shape[1] == 40
    assert inputs["decoder_input_ids"].shape[1] <= 40
    model(**inputs)


def test_no_start_token_is_refused():
    config = t5().config
    config.decoder_start_token_id = None
    with pytest.raises(UsageError, match="decoder_start_token_id"):
        load_data(["the cat"], tokenizer=target_tokenizer(), model_config=config)


# -- batches that are ready ---------------------------------------------------------------------------------------


def test_ready_batches_pass_through():
    ids = torch.arange(12).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 0]] * 3)
    data = load_data([{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:2].numpy()}])
    assert [batch.examples for batch in data] == [(0, 1, 2), (3, 4)]
    assert data.num_tokens == 9 + 8
    assert torch.equal(data.batches[0].masks()[4], mask.bool())
    assert data.batches[1].masks()[4].all()
    assert load_data([{"input_ids": ids}], num_samples=2).num_examples == 2
    assert load_data(data) is data
    assert load_data(data.batches).num_examples == 5
    same(load_data(iter([{"input_ids": ids.tolist()}])), load_data([{"input_ids": ids}]))


def test_images_have_no_masks():
    data = load_data([{"pixel_values": numpy.zeros((2, 3, 8, 8), dtype="float32"), "labels": torch.tensor([0, 1])}])
    assert data.batches[0].masks() == {}
    assert data.num_examples == 2
    assert data.num_tokens == 0
    assert data.has_labels


def test_an_endless_stream_of_batches_ends():
    def endless():
        while True:
            yield {"input_ids": torch.zeros(8, 4, dtype=torch.long)}

    assert load_data(endless()).num_examples == 1024


def test_a_data_loader_is_read_whole():
    rows = [{"input_ids": torch.arange(4)} for _ in range(1500)]
    assert load_data(torch.utils.data.DataLoader(rows, batch_size=500)).num_examples == 1500


def test_an_endless_stream_of_strings_ends():
    def endless():
        while True:
            yield "the cat sat on the mat"

    assert load_data(endless(), **CAUSAL, max_seq_length=16, num_samples=5).num_examples == 5
    assert load_data(endless(), **ENCODER, num_samples=5).num_examples == 5


def test_ready_batches_of_an_encoder_decoder_are_told_apart():
    ids = torch.tensor([[5, 6, 7, 1]])
    given = [{"input_ids": ids, "decoder_input_ids": ids, "labels": ids}]
    inputs = load_data(given, model=t5()).batches[0].inputs
    assert inputs["decoder_input_ids"].shape == inputs["labels"].shape == (1, 5)
    assert inputs["decoder_attention_mask"].tolist() == [[1, 1, 1, 1, 0]]
    labeled = load_data([{"input_ids": ids, "labels": torch.tensor([[5, 1, -100]])}], model=t5()).batches[0]
    assert labeled.inputs["decoder_input_ids"].tolist() == [[0, 5, 0]]
    assert labeled.masks()[3].tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        ([{"input_ids": torch.zeros(2, 3)}, {"input_ids": torch.arange(4)}], ("batch 1", "DataLoader")),
        ([{"input_ids": torch.zeros(2, 3), "text": ["a", "b"]}], ("batch 0", "'text'", "remove")),
        ([{"input_ids": torch.zeros(2, 3), "attention_mask": torch.zeros(1, 3)}], ("batch 0", "agree")),
        ([{"input_ids": torch.zeros(2, 3)}, "x"], ("batch 1", "str")),
    ],
)
def test_bad_batches_are_named(bad, parts):
    with pytest.raises(DataError) as caught:
        load_data(bad)
    for part in parts:
        assert part in str(caught.value)


def test_rows_of_a_batch():
    batch = Batch({"input_ids": torch.arange(12).view(4, 3), "scale": torch.tensor(2.0)}, (7, 8, 9, 10))
    part = batch.rows(1, 3)
    assert part.examples == (8, 9)
    assert part.inputs["input_ids"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert part.inputs["scale"] == 2


# -- what cannot be had -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "json", "pandas"])
def test_a_file_format_is_no_data_set(name, tmp_path, monkeypatch):
    """`datasets` would read all files of the current folder, those that are pickled too."""
    (tmp_path / "notes.txt").write_text("not meant\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"'{name}' is a file format"):
        open_hub(name, config=None, split="train", revision=None)


def test_hub_that_cannot_be_reached(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(DataError, match=r"'some/corpus' \(en split test revision abc\).*--data self.*FILE"):
        load_data("some/corpus", **CAUSAL, config="en", split="test", revision="abc")
    with pytest.raises(DataError, match=r"'Salesforce/wikitext' \(wikitext-2-raw-v1 split train\).*--data self"):
        load_data(None, **CAUSAL)


class _Builder:
    class info:  # noqa: N801 - as datasets calls it
        download_size, dataset_size = 1000, None

    base_path = "hf://datasets/Salesforce/wikitext@0123abc"


def test_wikitext_is_one_running_text(monkeypatch):
    lines = ["", " = Title = \n", "", " One . \n", " Two . \n"]
    asked = {}

    def opened(identifier, config, **more):
        asked.update(identifier=identifier, config=config, **more)
        return datasets.Dataset.from_dict({"text": lines})

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: _Builder)
    monkeypatch.setattr(datasets, "load_dataset", opened)
    data = load_data(None, tokenizer=WITH_BOS, model_config=llama_config(), max_seq_length=10)
    assert asked == {
        "identifier": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "train",
        "revision": None,
        "streaming": False,
    }
    expected = WITH_BOS("".join(lines))["input_ids"]
    assert all_ids(data).flatten().tolist() == expected[: len(expected) // 10 * 10]
    assert data.description["revision"] == "0123abc"


def test_a_large_hub_data_set_is_streamed(monkeypatch):
    modes = []

    def opened(*_, streaming, **__):
        modes.append(streaming)
        table = datasets.Dataset.from_dict({"text": sentences(30)})
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: _Builder)
    monkeypatch.setattr(datasets, "load_dataset", opened)
    for size, split in ((10, "train"), (None, "train"), (10**12, "train"), (10**12, "train[:5]")):
        monkeypatch.setattr(_Builder.info, "download_size", size)
        assert load_data("some/corpus", **ENCODER, split=split, num_samples=5).num_examples == 5
    assert modes == [False, True, True, False]


def test_local_paths_that_do_not_work(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_data(str(tmp_path / "absent.txt"), **CAUSAL)
    with pytest.raises(DataError, match="no such file"):
        load_data("absent.csv", **CAUSAL)
    odd = tmp_path / "corpus.parquet"
    odd.write_text("x")
    with pytest.raises(DataError, match=r"'\.parquet'.*\.txt, \.jsonl"):
        load_data(odd, **CAUSAL)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (["x"], {"tokenizer": None}, "tokenizer"),
        (["x"], {"model_config": None}, "model_config"),
        (["x"], {"num_samples": 0}, "num_samples"),
        (["x"], {"batch_size": True}, "batch_size"),
        (["x"], {"max_seq_length": 1.5}, "max_seq_length"),
        (["x"], {"label_column": "label"}, "--data-label-column label: llama has no head"),
        (["x"], {"target_column": "target"}, "target_column"),
        (3, {}, "holds no rows"),
        ({"text": ["x"], "label": [0, 1]}, {}, "holds no rows"),
    ],
)
def test_what_makes_no_sense_is_refused(data, options, message):
    with pytest.raises(UsageError, match=message):
        load_data(data, **(CAUSAL | options))


def test_items_of_no_use_are_named():
    with pytest.raises(DataError, match="item 1: an int"):
        load_data(["x", 3], **CAUSAL)


def test_defaults_are_128_windows_or_1024_texts_of_512_tokens_in_batches_of_8():
    text = "a b " * 40_000
    windows = load_data([text], **CAUSAL | {"model_config": llama_config(max_position_embeddings=600)})
    assert windows.num_examples == 128
    assert windows.batches[0].inputs["input_ids"].shape == (8, 512)
    texts = load_data(["a"] * 1025, **ENCODER)
    assert texts.num_examples == 1024
    assert len(texts.batches[0]) == 8


def test_digest_of_rows_depends_on_every_value_its_place_and_its_type():
    rows = [["ab", "c"], ["d", "e"], [1, 0]]
    changed = [
        [["a", "bc"], ["d", "e"], [1, 0]],
        [["c", "ab"], ["d", "e"], [1, 0]],
        [["ab", "c"], ["d", None], [1, 0]],
        [["ab", "c"], ["d", "e"], [1, "0"]],
        [["ab"], ["d"], [1]],
        rows[:2],
    ]
    digests = {digest_rows(*columns) for columns in [rows, *changed]}
    assert len(digests) == 7
    assert digest_rows(*rows) in digests
    with pytest.raises(ValueError, match="shorter"):
        digest_rows(["a", "b"], [1])
