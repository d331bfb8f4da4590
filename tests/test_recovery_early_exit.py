"""Early exit as a recovery: heads, thresholds, what is found by trial, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
import transformers
from adaptive_models import blocks_of, classifier, texts, with_exits
from tuning_problem import bert_config, reader, tuning_folders

import eckart
from eckart.adaptive import attach, behaviors_of, detach
from eckart.adaptive.early_exit import HEADS
from eckart.adaptive.token_skipping import TokenSkipping
from eckart.adaptive.trial import find_pooling, require_rows_can_leave
from eckart.checkpoint.read_back import verify_folder
from eckart.checkpoint.save import save
from eckart.data import Batch
from eckart.errors import ModelError, UsageError
from eckart.evaluation.sizes import measure_multiply_adds
from eckart.exports.densify import densify
from eckart.recovery import EarlyExitRecovery
from eckart.recovery.base import RecoveryContext
from eckart.recovery.exits.choose import (
    ExitPoint,
    choose_point,
    list_points,
    measure_quality,
    measure_standard_error,
)
from eckart.recovery.exits.heads import head_loss, train_head
from eckart.recovery.exits.states import ExitStates, find_blocks, record_states, try_exits
from eckart.recovery.recipe import TuneRecipe

SINGLE = "single_label_classification"
TRAINING = {"width": 8, "epochs": 30, "rate": 1e-2, "temperature": 1.0, "weight": 1.0, "seed": 0}


def problem(seed=0):
    """States of two classes, the logits of a model that tells them apart, and the classes."""
    stream = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (200,), generator=stream)
    states = torch.randn(200, 6, generator=stream) + 2.0 * labels[:, None] * torch.tensor([1.0, -1, 0, 0, 0, 0])
    return states, torch.stack([-4.0 * (labels - 0.5), 4.0 * (labels - 0.5)], 1), labels


def test_a_head_learns_what_the_model_says_whatever_the_size_of_its_states():
    states, taught, labels = problem()
    head = train_head(states, taught, None, problem=SINGLE, **TRAINING)
    assert float((head(states).argmax(-1) == labels).float().mean()) > 0.9
    scaled = train_head(300 * states + 40, taught, None, problem=SINGLE, **TRAINING)
    torch.testing.assert_close(scaled(300 * states + 40), head(states), rtol=1e-3, atol=1e-3)
    linear = train_head(states, taught, None, problem=SINGLE, **{**TRAINING, "width": 0})
    assert linear.dense is None
    assert float((linear(states).argmax(-1) == labels).float().mean()) > 0.9


def test_losses_are_the_equations():
    one, other = torch.tensor([[1.0, -1.0], [0.5, 2.0]]), torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    labels = torch.tensor([0, 1])
    p, q = (other / 2).softmax(-1), (one / 2).softmax(-1)
    divergence = 4 * (p * (p / q).log()).sum(-1).mean()
    cost = -torch.stack([one.log_softmax(-1)[0, 0], one.log_softmax(-1)[1, 1]]).mean()
    torch.testing.assert_close(head_loss(one, other, None, SINGLE, temperature=2.0, weight=3.0), divergence)
    torch.testing.assert_close(
        head_loss(one, other, labels, SINGLE, temperature=2.0, weight=3.0), divergence + 3 * cost
    )
    numbers = head_loss(one[:, :1], other[:, :1], torch.tensor([0.0, 0.0]), "regression", temperature=2.0, weight=3.0)
    torch.testing.assert_close(numbers, torch.tensor((1 + 2.25) / 2 + 3 * (1 + 0.25) / 2))
    goal = other.sigmoid()
    sets = head_loss(one, other, None, "multi_label_classification", temperature=1.0, weight=1.0)
    torch.testing.assert_close(sets, -(goal * one.sigmoid().log() + (1 - goal) * (-one).sigmoid().log()).mean())


def test_costs_are_of_the_blocks_and_heads_that_a_row_has_passed():
    states = ExitStates({}, torch.zeros(2, 2), None, torch.tensor([[10.0, 20, 30], [1, 2, 3]]).double(), tail=5)
    costs, whole = states.costs_of((1, 2), 2)
    assert costs.tolist() == [[17.0, 29.0, 39.0], [8.0, 11.0, 12.0]]
    assert whole == 30 + 3 + 2 * 5


def make_points(rule="entropy", problem=SINGLE):
    """Two exits on four rows; the second head is right on three, the first on two of which it is sure."""
    first = torch.tensor([[5.0, 0], [5, 0], [0.1, 0], [0.1, 0]])
    second = torch.tensor([[5.0, 0], [5, 0], [0, 3.0], [0.2, 0]])
    last = torch.tensor([[5.0, 0], [5, 0], [0, 5], [0, 5]])
    labels = torch.tensor([0, 0, 1, 1])
    costs = torch.tensor([[1.0, 2, 4]]).expand(4, -1)
    return list_points([first, second], last, labels, costs, 16.0, rule=rule, problem=problem)


def test_points_say_what_each_threshold_brings_and_costs():
    points = make_points()
    assert points == sorted(points, key=lambda point: point.speedup)
    assert (points[0].speedup, points[0].quality, points[0].left) == (1.0, 100.0, (0.0, 0.0, 1.0))
    assert (points[-1].speedup, points[-1].quality, points[-1].left) == (4.0, 50.0, (1.0, 0.0, 0.0))
    best, note = choose_point(points, 100.0, speedup=None, max_drop=0.0)
    assert (best.left, best.quality, note) == ((0.5, 0.25, 0.25), 100.0, None)
    assert best.speedup == 16 / (2 * 1 + 2 + 4)
    faster, note = choose_point(points, 100.0, speedup=2.5, max_drop=None)
    assert faster.speedup >= 2.5
    assert note is None
    most, note = choose_point(points, 100.0, speedup=9.0, max_drop=None)
    assert most.speedup == 4.0
    assert "speedup 9 is not reached: 4" in note
    least, note = choose_point(points, 200.0, speedup=None, max_drop=1.0)
    assert least.quality == 100.0
    assert "may lose more than 1 points: 100 with" in note
    # The second head is wrong on one row of four: one standard error of that is a quarter as well.
    assert [(point.quality, point.error) for point in points if point.left == (0.5, 0.5, 0.0)] == [(75.0, 25.0)]
    patient = make_points("patience")
    assert [(point.threshold, point.left) for point in patient] == [(1.0, (0.0, 0.75, 0.25))]


def test_a_threshold_that_is_good_by_chance_is_not_taken():
    def point(speedup, quality, error):
        return ExitPoint(speedup, None, quality, error, speedup, ())

    # Slowest first; of the third as many answers have become right as wrong.
    points = [point(1.0, 80.0, 0.0), point(1.2, 79.8, 0.2), point(1.9, 80.0, 1.1), point(2.5, 79.6, 0.3)]
    for drop, expected in ((0.3, 1.0), (0.5, 1.2), (0.8, 2.5)):
        best, note = choose_point(points, 80.0, speedup=None, max_drop=drop)
        assert (best.speedup, note) == (expected, None)
    assert choose_point(points, 80.0, speedup=1.1, max_drop=None)[0].speedup == 1.9
    least, note = choose_point(points[2:], 80.0, speedup=None, max_drop=0.5)
    assert least.speedup == 2.5
    assert "may lose more than 0.5 points: 0.4 with a standard error of 0.3 is the least" in note


def test_standard_errors_count_the_answers_that_differ_in_being_right():
    whole = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    answers = torch.tensor([[0, 1.0], [1, 0], [1, 0], [0, 1]])  # one wrong that was right, one right that was wrong
    labels = torch.tensor([0, 0, 0, 0])
    assert measure_quality(answers, whole, labels, SINGLE) == measure_quality(whole, whole, labels, SINGLE) == 50
    assert measure_standard_error(answers, whole, labels, SINGLE) == pytest.approx(100 * 2**0.5 / 4)
    assert measure_standard_error(whole, whole, labels, SINGLE) == 0
    three = torch.tensor([[1.0, 0, -1], [0, 1, -1], [0, 1, 2], [0, 1, -1]])
    kinds = torch.tensor([2, 2, 2, 2])  # answers that are wrong in another way change nothing
    assert measure_standard_error(three[[1, 1, 2, 3]], three, kinds, SINGLE) == 0
    assert measure_standard_error(three[[1, 1, 0, 3]], three, kinds, SINGLE) == 25
    assert measure_standard_error(answers, whole, None, "multi_label_classification") == 100 * 2**0.5 / 4
    assert measure_standard_error(answers, whole, None, "regression") == 0


def test_qualities_are_accuracy_agreement_and_correlation():
    answers, whole = torch.tensor([[1.0, 0], [0, 1], [0, 1]]), torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert measure_quality(answers, whole, None, SINGLE) == pytest.approx(200 / 3)
    assert measure_quality(answers, whole, torch.tensor([0, 1, 1]), SINGLE) == 100
    sets = torch.tensor([[1.0, -1], [-1, -1], [2, 2]])
    assert measure_quality(sets, sets, torch.tensor([[1, 0], [1, 0], [1, 1]]), "multi_label_classification") == (
        pytest.approx(200 / 3)
    )
    numbers = torch.tensor([[1.0], [2], [3]])
    assert measure_quality(numbers, numbers, torch.tensor([3.0, 2, 1]), "regression") == pytest.approx(-100)
    assert measure_quality(numbers, 2 * numbers, None, "regression") == pytest.approx(100)


# -- trials ----------------------------------------------------------------------------------------------


def batch(lengths=(5, 3)):
    return Batch(texts(lengths), tuple(range(len(lengths))))


def one_row(model):
    return lambda: model(**texts((6,))).logits


@pytest.mark.parametrize(
    ("kind", "options", "pooling"),
    [("Bert", {}, "first"), ("DistilBert", {}, "first"), ("ModernBert", {"classifier_pooling": "cls"}, "first"),
     ("ModernBert", {"classifier_pooling": "mean"}, "mean")],
)  # fmt: skip
def test_what_the_head_reads_is_found_by_trial(kind, options, pooling):
    model = classifier(kind, **options)
    assert find_pooling(model, blocks_of(model), one_row(model), 6) == pooling
    assert try_exits(model, blocks_of(model), (1, 3), [batch()]) == pooling
    assert not behaviors_of(model)


def test_models_from_which_no_row_can_leave_are_refused():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "pad_token_id": 0}
    causal = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes)).eval()
    with pytest.raises(ModelError, match=r"reads the last token.*--recovery sandwich"):
        find_pooling(causal, find_blocks(causal, batch()), one_row(causal), 6)
    model = classifier()
    handle = model.bert.encoder.layer[2].register_forward_hook(lambda _, __, out: out - out.mean(0))
    with pytest.raises(ModelError, match="left its batch after block 1, the others differ"):
        require_rows_can_leave(model, blocks_of(model), lambda: model(**texts()).logits, 5, (1,))
    handle.remove()
    assert not behaviors_of(model)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 40,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "eos_token_id": 2}  # fmt: skip
    both = transformers.BartForSequenceClassification(transformers.BartConfig(**sizes)).eval()
    ids = torch.tensor([[3, 4, 5, 2]])
    with pytest.raises(ModelError, match="blocks of 2 lists"):
        find_blocks(both, Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (0,)))
    flat = transformers.BertForSequenceClassification(bert_config(num_hidden_layers=1)).eval()
    with pytest.raises(ModelError, match="cannot be walked block by block"):
        find_blocks(flat, batch())


def test_states_and_costs_are_those_of_the_model():
    model = classifier()
    batches = [Batch({**texts((5, 3)), "labels": torch.tensor([1, 0])}, (0, 1)),
               Batch({**texts((4,)), "labels": torch.tensor([1])}, (2,))]  # fmt: skip
    found = record_states(model, blocks_of(model), (1, 3), lambda hidden, real: hidden[:, 0], batches)
    for after in (1, 3):
        states = [model(**texts(lengths), output_hidden_states=True).hidden_states[after] for lengths in ((5, 3), (4,))]
        torch.testing.assert_close(found.states[after], torch.cat([each[:, 0] for each in states]))
    assert found.labels.tolist() == [1, 0, 1]
    each = sum(m.weight.numel() for m in model.bert.encoder.layer[0].modules() if isinstance(m, torch.nn.Linear))
    assert found.costs.tolist() == [[each * length * block for block in (1, 2, 3, 4)] for length in (5, 3, 4)]
    assert found.tail == model.bert.pooler.dense.weight.numel() + model.classifier.weight.numel()
    counted = measure_multiply_adds(model, lambda: model(**texts((4,))))
    assert counted == 4 * 4 * each + found.tail


def test_the_speedup_that_is_foretold_is_what_the_model_computes():
    model, lengths = with_exits(classifier()), (9, 4, 7, 2, 6)
    heads, exits = getattr(model, HEADS), (1, 2, 3)
    whole = classifier()
    states = record_states(whole, blocks_of(whole), exits, lambda hidden, real: hidden[:, 0], [batch(lengths)])
    costs = states.costs_of(exits, sum(p.numel() for p in heads["1"].parameters() if p.dim() == 2))
    given = [heads[str(place)](states.states[place]) for place in exits]
    (point,) = list_points(
        given, states.logits, None, *costs, rule="entropy", problem=SINGLE, candidates=[(0.4, None)]
    )  # fmt: skip
    rows = [{"input_ids": ids[None, :n]} for ids, n in zip(texts(lengths)["input_ids"], lengths, strict=True)]
    done = [measure_multiply_adds(m, lambda m=m: [m(**row) for row in rows]) for m in (whole, model)]
    assert done[0] / done[1] == pytest.approx(point.speedup, rel=1e-6)
    assert point.speedup > 1.3
    leaves = torch.bincount(torch.cat([model(**row).exit_blocks for row in rows]), minlength=5)[1:]
    assert point.left == pytest.approx((leaves / 5).tolist())


# -- as a recovery ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A factored classifier with exits at a speedup of 2, published."""
    folder = tmp_path_factory.mktemp("early")
    return eckart.tune(
        tuning_folders() / "classifier", recovery=EarlyExitRecovery(speedup=2.0, epochs=3), data_label_column="label",
        data=tuning_folders() / "rows.tsv", max_seq_length=16, output_dir=folder / "fast",
    )  # fmt: skip


def test_a_tuning_says_what_it_did_everywhere(tuned):
    done = tuned.report["recovered_by"]
    assert done["held_out"]["speedup"] >= 2.0
    assert done["held_out"]["against"] == "labels"
    assert done["behavior"]["exits"] == [1, 2, 3]
    assert "fewer multiply-adds" in str(tuned)
    page = (tuned.folder / "eckart" / "report.html").read_text()
    assert "early exit after block 1, 2, 3 of 4" in page
    card = (tuned.folder / "README.md").read_text()
    assert "It does less for easy inputs: early exit after block 1, 2, 3 of 4" in card
    where = f"where the entropy of the answer is below {done['behavior']['threshold']:.4g}"
    assert verify_folder(tuned.folder).behaviors == [f"early exit after block 1, 2, 3 of 4, {where}"]


def test_pipelines_answer_early(tuned):
    pipe = transformers.pipeline("text-classification", str(tuned.folder), device=-1, top_k=None)
    lines = ["yes good fine 3", "no bad poor 2 and more words", "yes"]
    inputs = tuned.tokenizer(lines, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = tuned.model(**inputs)
    assert set(expected.exit_blocks.tolist()) < {1, 2, 3, 4}
    for found, logits in zip(pipe(lines, batch_size=3), expected.logits, strict=True):
        scores = {entry["label"]: entry["score"] for entry in found}
        assert [scores["LABEL_0"], scores["LABEL_1"]] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)


def test_what_cannot_hold_it_refuses_or_leaves_it_out_when_asked(tuned, tmp_path):
    for format in ("dense", "remote-code"):
        with pytest.raises(ModelError, match=r"has early-exit, which format .* cannot hold.*--drop-adaptive"):
            eckart.export(tuned.folder, tmp_path / "no", format=format)
    eckart.export(tuned.folder, tmp_path / "whole", format="dense", drop_adaptive=True)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert not hasattr(plain.config, "quantization_config")
    assert not hasattr(plain, HEADS)
    whole = eckart.load(tuned.folder)
    detach(whole)
    torch.testing.assert_close(plain(**texts()).logits, whole(**texts()).logits)
    early = densify(eckart.load(tuned.folder))
    torch.testing.assert_close(early(**texts()).logits, eckart.load(tuned.folder)(**texts()).logits)
    early.save_pretrained(tmp_path / "early")
    assert torch.equal(eckart.load(tmp_path / "early")(**texts()).logits, early(**texts()).logits)
    rows = {"data": tuning_folders() / "rows.tsv", "data_label_column": "label"}
    with pytest.raises(UsageError, match="recovery full: the model has early-exit"):
        eckart.tune(tuned.folder, recovery="full", **rows)
    with pytest.raises(ModelError, match="already factored"):
        eckart.compress(tuned.folder, method="svd", output_dir=tmp_path / "no")
    with pytest.raises(ModelError, match=r"has early-exit.*detach\(model\)"):
        eckart.compress(early, method="svd")
    again = eckart.tune(tuned.folder, recovery=EarlyExitRecovery(after="2", epochs=1), max_seq_length=16, **rows)
    assert list(getattr(again.model, HEADS)) == ["2"]


def test_a_dense_model_with_exits_is_told_from_a_factored_one(tmp_path):
    save(with_exits(classifier()), tmp_path / "dense")
    with pytest.raises(ModelError, match=r"has early-exit .*eckart export .*--drop-adaptive"):
        eckart.compress(tmp_path / "dense", method="svd", output_dir=tmp_path / "no")
    eckart.export(tmp_path / "dense", tmp_path / "whole", format="dense", drop_adaptive=True)
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())


def test_exits_and_rounded_weights_go_together(tmp_path):
    model = with_exits(classifier(hidden_size=64, intermediate_size=64), features=64)
    eckart.quantize(model, "int8")
    expected = model(**texts())
    model.save_pretrained(tmp_path / "rounded")
    found = eckart.load(tmp_path / "rounded")(**texts())
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.exit_blocks, expected.exit_blocks)


def test_the_threshold_is_chosen_on_other_rows_where_asked():
    rows = {"data": tuning_folders() / "rows.tsv", "data_label_column": "label", "max_seq_length": 16}
    few = ["yes good fine\t1", "no bad poor\t0", "yes good\t1"]
    given = [dict(zip(("text", "label"), row.split("\t"), strict=True)) for row in few]
    options = {"recovery": EarlyExitRecovery(speedup=1.2, epochs=1, choose_on="eval"), "eval_data": given, **rows}
    done = eckart.tune(tuning_folders() / "classifier", **options).report["recovered_by"]
    assert (done["rows"], done["held_out"]["rows"]) == (40, 3)
    assert done["held_out"]["against"] == "labels"
    done = eckart.tune(tuning_folders() / "classifier", recovery=EarlyExitRecovery(epochs=1), **rows)
    assert (done.report["recovered_by"]["rows"], done.report["recovered_by"]["held_out"]["rows"]) == (29, 7)


def test_labels_are_not_needed():
    result = eckart.tune(
        tuning_folders() / "classifier", recovery=EarlyExitRecovery(max_drop=10, epochs=2), max_seq_length=16,
        data=["yes good fine", "no bad poor"] * 15 + ["well"] * 4,
    )  # fmt: skip
    assert result.report["task"] == "logits"
    assert result.report["recovered_by"]["held_out"]["against"] == "the whole model's answers"
    assert result.report["scores"]["before"]["same most likely"] == 1.0


def test_a_regression_leaves_by_patience():
    torch.manual_seed(0)
    config = bert_config(num_labels=1, num_hidden_layers=4, initializer_range=0.3)
    model = transformers.BertForSequenceClassification(config).eval()
    options = {"data": tuning_folders() / "rows.tsv", "data_label_column": "score", "max_seq_length": 16}
    result = eckart.tune(model, reader(), recovery=EarlyExitRecovery(speedup=1.2, epochs=3), **options)
    behavior = behaviors_of(result.model)["early-exit"]
    assert (behavior.rule, behavior.problem) == ("patience", "regression")
    assert behavior.tolerance > 0
    assert result.report["recovered_by"]["held_out"]["speedup"] >= 1.2
    with pytest.raises(UsageError, match="no entropy"):
        eckart.tune(model, reader(), recovery=EarlyExitRecovery(rule="entropy"), **options)
    with pytest.raises(UsageError, match="needs a tolerance"):
        eckart.tune(model, reader(), recovery=EarlyExitRecovery(threshold=1), **options)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"speedup": 2, "max_drop": 1}, "speedup and max_drop"), ({"after": "two"}, "after must be numbers of blocks"),
     ({"speedup": 0.5}, "speedup"), ({"tolerance": 1.0}, "tolerance goes with threshold"), ({"rule": "luck"}, "rule")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        EarlyExitRecovery(**settings)


def test_settings_that_do_not_fit_the_model_are_refused():
    rows = {"data": tuning_folders() / "rows.tsv", "data_label_column": "label", "max_seq_length": 16}
    with pytest.raises(UsageError, match=r"the model has 4 blocks.*after=1,2,3"):
        eckart.tune(tuning_folders() / "classifier", recovery=EarlyExitRecovery(after="4"), **rows)
    with pytest.raises(UsageError, match="two exits"):
        eckart.tune(tuning_folders() / "classifier", recovery=EarlyExitRecovery(after="2", rule="patience"), **rows)
    with pytest.raises(UsageError, match="the one answer"):
        eckart.tune(
            tuning_folders() / "dense", recovery=EarlyExitRecovery(), data=tuning_folders() / "text.txt",
            max_seq_length=16,
        )  # fmt: skip


def test_exits_go_beside_tokens_that_leave():
    model = classifier()
    blocks = blocks_of(model)
    attach(model, TokenSkipping("power-bert", (0.8, 0.5, 0.3), "attention.self", ("first",)), blocks)
    lengths = (9, 4, 7, 2, 6)
    found = record_states(model, blocks, (1, 2, 3), lambda hidden, real: hidden[:, 0], [batch(lengths)])
    fewer = [found.costs[:, 0], *(found.costs[:, 1:] - found.costs[:, :-1]).T]
    assert all(bool((later <= before).all()) for before, later in pairwise(fewer))
    assert float(fewer[-1].sum()) < 0.5 * float(fewer[0].sum())
    assert try_exits(model, blocks, (1, 2, 3), [batch(lengths)]) == "first"
    both = with_exits(model)
    whole = both(**texts(lengths))
    assert len(set(whole.exit_blocks.tolist())) > 1
    alone = [both(input_ids=ids[None, :n]) for ids, n in zip(texts(lengths)["input_ids"], lengths, strict=True)]
    assert whole.exit_blocks.tolist() == [int(one.exit_blocks) for one in alone]
    torch.testing.assert_close(whole.logits, torch.cat([one.logits for one in alone]), rtol=1e-4, atol=1e-5)
    detach(both, "early-exit")
    assert list(behaviors_of(both)) == ["token-skipping"]


@pytest.mark.parametrize("told", ["first", "mean"])
def test_heads_read_what_tells_more(told):
    """Classes show in the first token alone, or in the others alone."""
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(bert_config(num_labels=2, num_hidden_layers=3)).eval()
    stream = torch.Generator().manual_seed(0)
    rows = []
    for number in range(60):
        words = torch.randint(5, 200, (8,), generator=stream).tolist()
        mark = 1000 + number % 2
        ids = [mark, *words] if told == "first" else [7, *([mark] * 4), *words]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": number % 2})
    batches = [Batch({key: torch.tensor([row[key] for row in rows]) for key in rows[0]}, tuple(range(60)))]
    with torch.no_grad():
        for layer in model.bert.encoder.layer:  # tokens do not see each other
            layer.attention.output.dense.weight.zero_()
    context = RecoveryContext(None, "classification", TuneRecipe(), 1)
    recovery = EarlyExitRecovery(speedup=1.1, after="1", epochs=20, labels=5.0)
    with torch.no_grad():
        recovery.solve(model, context, batches, None)
    assert behaviors_of(model)["early-exit"].pooling == told
    named = EarlyExitRecovery(speedup=1.1, after="1", epochs=1, pooling="first" if told == "mean" else "mean")
    with torch.no_grad():
        named.solve(model, context, batches, None)
    assert behaviors_of(model)["early-exit"].pooling == named.pooling
