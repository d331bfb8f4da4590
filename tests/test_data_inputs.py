"""What people bring as data: tables of every kind, chats, token ids, data frames; what is not clear is refused."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager

import datasets
import numpy
import pandas
import pytest
import torch
from test_data_models import (
    WORDS,
    bart,
    bert_config,
    build,
    byte_tokenizer,
    llama_config,
    target_tokenizer,
    word_tokenizer,
)
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BertForSequenceClassification, BertModel

import eckart
from eckart.data import load_data, load_task
from eckart.data.columns import replace_surrogates
from eckart.data.documents import load_documents
from eckart.data.rows import read_path
from eckart.errors import DataError, UsageError

BYTES = byte_tokenizer()
CAUSAL = {"tokenizer": BYTES, "model_config": llama_config()}
ENCODER = {"tokenizer": word_tokenizer(), "model_config": bert_config()}


def table(folder, content, name="a.csv", **more):
    path = folder / name
    path.write_text(content)
    return [row.values for row in read_path(path, **more)]


# -- tables -------------------------------------------------------------------------------------------------------


def test_cells_are_as_long_as_a_book(tmp_path):
    import csv

    book = "word " * 40_000
    before = csv.field_size_limit()
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        assert table(tmp_path, f"text{mark}label\n{book}{mark}1\nhi{mark}0\n", name)[0] == {"text": book, "label": "1"}
    assert csv.field_size_limit() == before  # it belongs to the whole process


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (",text,label\n0,hello there,1\n1,bye,0\n", {"Unnamed: 0": "0", "text": "hello there", "label": "1"}),
        (",,text\n0,a,hello there\n", {"Unnamed: 0": "0", "Unnamed: 1": "a", "text": "hello there"}),
        (",remark,vote\n0,hello there,1\n", {"Unnamed: 0": "0", "remark": "hello there", "vote": "1"}),
        ("text,2024\nhello there,1\n", {"text": "hello there", "2024": "1"}),
        ("Text,0,1\nhello there,1,2\n", {"Text": "hello there", "0": "1", "1": "2"}),
        ("label,text,\n1,hello there,x\n", {"label": "1", "text": "hello there", "Unnamed: 2": "x"}),
        ("text;label\nhello, there;1\nbye;0\n", {"text": "hello, there", "label": "1"}),
        ("a fine, old film;1\na dull, new one;0\n", {"0": "a fine, old film", "1": "1"}),
        ("text|label\nhello there|1\n", {"text": "hello there", "label": "1"}),
        ("text\tlabel\nhello there\t1\n", {"text": "hello there", "label": "1"}),
        ("The first line of all.\nAnd another one here\n", {"0": "The first line of all."}),
        ("hello there my old friend\nbye\n", {"0": "hello there my old friend"}),
        ("文本,标签\n你好,1\n", {"文本": "你好", "标签": "1"}),
        ("I came; I saw\nhello there\n", {"0": "I came; I saw"}),
    ],
)
def test_headers_and_separators_are_told_by_the_first_rows(tmp_path, content, expected):
    assert table(tmp_path, content)[0] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("remark\nhello there\nbye\n", r"a\.csv:1: does the first row name.*--data-column remark.*--data-column 0"),
        ("remark,2024\nhello there,1\n", r"does the first row name.*--data-column remark.*--data-column 0"),
        ("text,text\nhello,there\n", r"a\.csv:1: two columns are called 'text'"),
        ("hello there friend\nhello, there\n", r"a\.csv:2: 2 cells under 1 columns"),
    ],
)
def test_what_is_not_clearly_a_table_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        table(tmp_path, content)


def test_the_user_says_what_the_first_row_is(tmp_path):
    content = "remark\nhello there\nbye\n"
    assert table(tmp_path, content, asked=("remark",)) == [{"remark": "hello there"}, {"remark": "bye"}]
    assert table(tmp_path, content, asked=("0",)) == [{"0": "remark"}, {"0": "hello there"}, {"0": "bye"}]
    assert table(tmp_path, "text,label\nhello,1\n", asked=("0",)) == [{"0": "hello", "1": "1"}]  # no text called "text"


@contextmanager
def ends_within(seconds: int):
    """What waits for ever fails the test."""

    def stop(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_what_may_have_no_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for name, kind in (("pipe.txt", "a pipe"), ("zero.csv", "a device")):
        for read in (lambda path: load_data(path, **CAUSAL), load_documents):
            with ends_within(60), pytest.raises(DataError, match=rf"{name}: {kind}"):
                read(str(tmp_path / name))


def test_nested_json_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:1: not valid JSON"):
        table(tmp_path, "[" * 100_000, "a.jsonl")


# -- columns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "text", "pair", "label"),
    [
        (("sentence1", "sentence2", "score"), "sentence1", "sentence2", "score"),
        (("premise", "hypothesis", "label"), "premise", "hypothesis", "label"),
        (("question1", "question2", "is_duplicate"), "question1", "question2", "is_duplicate"),
        (("#1 String", "#2 String", "Quality"), "#1 String", "#2 String", "Quality"),
        (("sentence_A", "sentence_B", "relatedness_score"), "sentence_A", "sentence_B", "relatedness_score"),
        (("review", "source_name", "stars"), "review", None, "stars"),
        (("text", "text2", "label"), "text", None, "label"),
    ],
)
def test_usual_columns_are_known(names, text, pair, label):
    rows = [dict(zip(names, ("a fine film", "a dull one", 1), strict=True))]
    description = load_task(rows).description
    assert [description[f"{which}column"] for which in ("", "pair_", "label_")] == [text, pair, label]
    if pair is not None:
        assert load_task(rows, column=pair).description["pair_column"] is None
    assert load_data(rows, **ENCODER).description["column"] == text


# -- from Python --------------------------------------------------------------------------------------------------


def test_a_data_frame_gives_its_rows():
    frame = pandas.DataFrame({"text": ["the dog runs"] * 20, "label": [0, 1] * 10})
    data = load_data(frame, **ENCODER)
    assert data.num_examples == 20
    assert data.description["column"] == "text"
    assert load_data(frame["text"], **ENCODER).num_examples == 20
    assert load_data({"text": list(frame["text"]), "label": [0] * 20}, **ENCODER).num_examples == 20
    assert load_task(frame).labels == [0, 1] * 10
    pyarrow = pytest.importorskip("pyarrow")
    assert load_data(pyarrow.Table.from_pandas(frame), **ENCODER).num_examples == 20
    frame.loc[3, "text"] = None
    with pytest.raises(DataError, match="data, item 3: no value in column 'text'"):
        load_data(frame, **ENCODER)


def test_a_dataset_with_rows_by_number_is_read():
    class Rows(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"text": f"the dog runs {index}"}

    assert load_data(Rows(), **ENCODER).num_examples == 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"the dog", "a cat"}, "a set has no order"),
        (frozenset(["the dog"]), "a set has no order"),
        (b"the dog", "a bytes holds no rows"),
        (torch.zeros(3, 4), "neither text, a row nor a batch"),
    ],
)
def test_what_holds_no_rows_is_refused(data, message):
    with pytest.raises((UsageError, DataError), match=message):
        load_data(data, **ENCODER)


def test_a_list_of_file_names_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("the dog runs")
    with pytest.raises(DataError, match="is the name of a file"):
        load_data([str(tmp_path / "a.txt")], **ENCODER)


ROWS = [[5, 6, 7], [8, 9], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        [torch.tensor(row) for row in ROWS],
        [numpy.array(row) for row in ROWS],
        [{"input_ids": row, "attention_mask": [1] * len(row), "idx": 3} for row in ROWS],
        [{"input_ids": torch.tensor(row)} for row in ROWS],
        datasets.Dataset.from_dict({"input_ids": ROWS, "id": [1, 2, 3]}),
        {"input_ids": ROWS},
        [{"input_ids": ROWS}],
    ],
    ids=["lists", "tensors", "arrays", "rows", "rows of tensors", "dataset", "unpadded", "unpadded batch"],
)
@pytest.mark.parametrize("kind", [CAUSAL, ENCODER], ids=["causal", "encoder"])
def test_rows_of_token_ids_are_read_as_they_are(data, kind):
    loaded = load_data(data, **kind, batch_size=2)
    rows = {}
    for batch in loaded:
        assert set(batch.inputs) == {"input_ids", "attention_mask"}
        for place, ids, mask in zip(batch.examples, *batch.inputs.values(), strict=True):
            rows[place] = ids[mask.bool()].tolist()
    assert rows == dict(enumerate(ROWS))


def test_token_ids_of_a_tensor_or_a_loader_are_batches():
    ids = torch.arange(12).view(3, 4)
    for data in (ids, [ids], DataLoader(TensorDataset(ids), batch_size=3), {"input_ids": ids}):
        loaded = load_data(data, **CAUSAL)
        assert torch.equal(torch.cat([batch.inputs["input_ids"] for batch in loaded]), ids)


def test_rows_of_token_ids_bring_their_labels(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [1, -100, 2]}, {"input_ids": [5], "labels": [0]}]
    batch = load_data(rows, **ENCODER).batches[0]
    assert batch.inputs["labels"].tolist() == [[1, -100, 2], [0, -100, -100]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row, "label": 1}) + "\n" for row in ROWS))
    assert load_data(path, **CAUSAL).num_tokens == 9
    model = build(BertForSequenceClassification, bert_config())
    assert load_data(path, model=model, label_column="label").batches[0].inputs["labels"].tolist() == [1, 1, 1]
    assert load_data(path, **CAUSAL, max_seq_length=2).num_tokens == 6
    pairs = [{"input_ids": [5, 6, 7], "labels": [8, 9]}] * 2
    two_sided = load_data(pairs, tokenizer=target_tokenizer(), model=bart()).batches[0]
    assert set(two_sided.masks()) == {2, 3}
    both = [{"text": "abc", "input_ids": [1, 2]}] * 9
    assert load_data(both, **CAUSAL).description["column"] == "text"  # it says what the ids are of
    assert load_data(both, **CAUSAL, column="input_ids").num_tokens == 18


def test_images_one_by_one_are_put_together():
    images = [{"pixel_values": torch.randn(3, 4, 4), "label": 1} for _ in range(5)]
    loaded = load_data(images, model_config=bert_config(), batch_size=2)
    assert [tuple(batch.inputs["pixel_values"].shape) for batch in loaded] == [(2, 3, 4, 4)] * 2 + [(1, 3, 4, 4)]


def test_ready_batches_are_cut_only_where_that_is_asked_for():
    batches = [{"input_ids": torch.arange(8).view(2, 4)} for _ in range(30)]
    assert load_data(batches, **CAUSAL, extra_samples=8).num_examples == 60
    assert load_data(batches, **CAUSAL, num_samples=10, extra_samples=8).num_examples == 18


def test_a_run_reads_all_batches_and_as_many_texts_as_are_asked_for():
    model = build(BertModel, bert_config()).eval()
    batches = [{"input_ids": torch.randint(4, 20, (8, 6))} for _ in range(20)]  # more rows than a default would take
    data = eckart.compress(model, data=batches, keep=0.6, method="drone").report["data"]
    assert data["calibration_examples"] + data["held_out_examples"] == 160
    texts = [f"the cat {word}" for word in WORDS] * 4
    told = eckart.compress(model, word_tokenizer(), data=texts, num_samples=16, keep=0.6, method="drone").report["data"]
    assert told["calibration_examples"] == 16
    assert told["held_out_examples"] == 8


# -- chats --------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% if tools %}<{% for t in tools %}{{ t.function.name }}{% endfor %}>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}"
    "{% if 'tool_calls' in m %}{% for c in m.tool_calls %}({{ c.function.name }}"
    "{% for key, value in c.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}){% endfor %}{% endif %}"
    "{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": None}}]


def written(row, template=TEMPLATE):
    tokenizer = byte_tokenizer(template=template)
    texts, _ = load_documents([row], tokenizer=tokenizer)
    return texts[0]


def calling(arguments):
    call = {"type": "function", "function": {"name": "search", "arguments": arguments}}
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]


def test_chats_with_tool_calls_are_written():
    expected = "[user]hi[assistant](search q=x)"
    for arguments in ({"q": "x"}, '{"q": "x"}'):
        chat = calling(arguments)
        assert written({"messages": chat}) == expected
        assert written({"messages": json.dumps(chat)}) == expected
        del chat[1]["content"]
        assert written(chat) == expected
    filled = [{"role": "user", "content": "hi", "tool_calls": None}, {"role": "tool", "content": "y", "name": None}]
    assert written({"messages": filled}) == "[user]hi[tool]y"  # as tables fill rows up
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert written({"messages": calling({"q": "x"}), "tools": tools}) == f"<search>{expected}"
    for tools in ([], None, ""):
        assert written({"messages": calling({"q": "x"}), "tools": tools}) == expected
    with pytest.raises(DataError, match=r"item 0: column 'messages': the tools beside it"):
        written({"messages": calling({"q": "x"}), "tools": "{"})


def test_templates_that_take_strings_get_strings():
    inner = "{% for c in m.tool_calls or [] %}{{ '<' + c.function.arguments + '>' }}{% endfor %}"
    template = f"{{% for m in messages %}}{inner}{{% endfor %}}"
    assert written({"messages": calling({"q": "x"})}, template) == '<{"q": "x"}>'
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert written({"messages": parts}) == "[user]ab"


def test_chats_of_other_conventions_are_written(tmp_path):
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    assert written({"conversations": shared, "id": "a"}) == "[user]hi[assistant]yes"
    path = tmp_path / "a.csv"
    chat = json.dumps(calling({"q": "x"})).replace('"', '""')
    path.write_text(f'id,messages\n1,"{chat}"\n')
    tokenizer = byte_tokenizer(template=TEMPLATE)
    assert load_documents(str(path), tokenizer=tokenizer)[0] == ["[user]hi[assistant](search q=x)"]
    with pytest.raises(DataError, match=r"a\.csv:2: column 'messages' holds chat messages.*chat_template"):
        load_data(str(path), **CAUSAL)
    assert written({"text": '[1, 2] and "[" in a text'}) == '[1, 2] and "[" in a text'
    assert written({"text": '[{"a": 1}]'}) == '[{"a": 1}]'


# -- text ---------------------------------------------------------------------------------------------------------


def test_surrogates_that_no_tokenizer_takes_are_replaced(tmp_path):
    assert replace_surrogates("a\ud800b \ud83d\ude00 \udc00") == "a\ufffdb \U0001f600 \ufffd"
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc \\ud800 def"}\n' * 9)
    assert load_data(path, **CAUSAL).num_tokens
    assert load_data(["abc \ud800"] * 9, **ENCODER).num_tokens
    assert load_documents(["abc \ud800"])[0] == ["abc \ufffd"]
    assert load_task([{"text": "abc \ud800", "label": 1}]).texts[0].text == "abc \ufffd"
