"""What a training reads, masks, calls, keeps and is scored by, one part at a time."""

from __future__ import annotations

import copy
import random
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from problems import close
from tiny import DEMO, llama
from torch.nn import functional
from transformers import AutoTokenizer
from tuning_problem import LENGTH, VOCABULARY, batch, bert, gpt2, interrupted

from eckart.errors import DataError, NumericalError, UsageError
from eckart.recovery import Recovery, RecoveryContext, make_recovery
from eckart.recovery.distil import TERMS
from eckart.recovery.recipe import make_tune_recipe
from eckart.recovery.training import TrainingData, is_better, load_training_data, scorer, train
from eckart.recovery.training import data as training_data
from eckart.recovery.training.data import _split, load_labeled
from eckart.recovery.training.masking import mask_tokens
from eckart.recovery.training.order import epoch_batches
from eckart.recovery.training.scorer import Scorer, Scores
from eckart.storage.journal import Journal

# -- masking -------------------------------------------------------------------------------------------

READER = SimpleNamespace(all_special_ids=[0, 1], mask_token_id=3)


def test_of_real_tokens_a_seventh_is_masked_and_is_what_is_learnt():
    stream = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 1000, (100, 100), generator=stream)
    ids[:, 0], mask = 1, torch.ones_like(ids)
    ids[:, 90:], mask[:, 90:] = 7, 0  # a padding token that the tokenizer does not name
    given = {"input_ids": ids, "attention_mask": mask}
    made = mask_tokens(given, READER, 1000, 5)
    chosen = made["labels"] != -100
    assert not chosen[:, 0].any()
    assert not chosen[:, 90:].any()
    assert torch.equal(made["labels"][chosen], ids[chosen])
    assert torch.equal(made["input_ids"][~chosen], ids[~chosen])
    assert float(chosen[:, 1:90].float().mean()) == pytest.approx(0.15, abs=0.02)
    now, before = made["input_ids"][chosen], ids[chosen]
    shares = [float(part.float().mean()) for part in (now == 3, now == before, (now != 3) & (now != before))]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert all(torch.equal(value, mask_tokens(given, READER, 1000, 5)[key]) for key, value in made.items())
    assert not torch.equal(mask_tokens(given, READER, 1000, 6)["labels"], made["labels"])


def test_a_short_text_has_one_token_masked():
    ids = torch.tensor([[1, 9]])
    for seed in range(8):
        assert mask_tokens({"input_ids": ids}, READER, 20, seed)["labels"].tolist() == [[-100, 9]]


# -- how a model is scored -----------------------------------------------------------------------------


@pytest.mark.parametrize("higher", [True, False])
def test_a_model_that_scores_the_same_is_better_and_one_without_a_score_is_not(higher):
    asked = Scorer(lambda model: Scores({}), "score", higher, "")

    def judged(after, before):
        return is_better(asked, Scores({"score": after}), Scores({"score": before}))

    assert judged(2.0, 1.0) == higher
    assert judged(1.0, 2.0) != higher
    assert judged(1.0, 1.0)
    for bad in (float("nan"), float("inf")):
        assert not judged(bad, 1.0)
        assert judged(1.0, bad)
        assert not judged(bad, bad)


@pytest.mark.parametrize(("gained", "lost", "taken"), [
    (0, 0, True), (1, 0, True), (2, 1, False), (3, 1, True), (5, 4, False), (6, 3, True), (9, 6, False), (9, 5, True),
    (0, 1, False), (4, 9, False),
])  # fmt: skip
def test_more_right_answers_count_beyond_chance(gained, lost, taken):
    # One standard error of the difference: gained - lost >= sqrt(gained + lost), however many rows agree.
    for agreed in (0, 300):
        before = [False] * gained + [True] * lost + [True, False] * agreed
        after = [True] * gained + [False] * lost + [True, False] * agreed
        scores = [Scores({"accuracy": sum(right) / max(1, len(right))}, tuple(right)) for right in (after, before)]
        assert is_better(Scorer(lambda model: Scores({}), "accuracy", True, ""), *scores) == taken


def test_the_masked_scorer_masks_the_same_tokens_each_time(monkeypatch):
    seeds = []
    monkeypatch.setattr(scorer, "mask_tokens", lambda *given: seeds.append(given[-1]) or mask_tokens(*given))
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(bert().config).eval()
    one = {key: value for key, value in batch(0).items() if key != "labels"}
    score = scorer.masked_scorer(READER, [one, one], 4).score
    assert score(model) == score(model)
    assert seeds == [4, 5, 4, 5]


# -- what is trained on, and what is held out ----------------------------------------------------------


def asked(**options):
    return make_tune_recipe({"recovery": "full", "max_seq_length": 8, **options})


@pytest.fixture(scope="module")
def reader():
    found = AutoTokenizer.from_pretrained(DEMO)
    found.pad_token = found.pad_token or found.eos_token
    return found


def causal(monkeypatch, reader, data, eval_data=None, **options):
    """The trained text, decoded, and the texts that are scored."""
    held = []
    monkeypatch.setattr(training_data, "text_scorer", lambda tokenizer, texts, *_: held.extend(texts))
    model = llama(num_hidden_layers=1)
    made = load_training_data(asked(**options), data, eval_data, "causal", model, reader, None)
    return made, "".join(reader.decode(row["input_ids"]) for row in made.rows), held


def test_held_out_rows_are_not_trained_on():
    rows = [f"row {i}" for i in range(25)]
    trained, held = _split(rows, 3)
    assert len(held) == 3
    assert sorted(trained + held) == sorted(rows)
    assert held != _split(rows, 4)[1]
    with pytest.raises(DataError, match="one row"):
        _split(rows[:1], 0)


def test_the_end_of_one_text_is_held_out(monkeypatch, reader, tmp_path):
    text = " ".join(f"word{i}" for i in range(200))
    (tmp_path / "one.txt").write_text(text)
    made, trained, held = causal(monkeypatch, reader, str(tmp_path / "one.txt"))
    (end,) = held
    assert len(end) == pytest.approx(len(text) / 10, abs=1)
    assert text.endswith(end)
    assert "word170" in trained
    assert not any(f"word{i}" in trained for i in range(185, 200))
    assert all(row["labels"] == row["input_ids"] for row in made.rows)
    fewer, some, _ = causal(monkeypatch, reader, str(tmp_path / "one.txt"), num_samples=3)
    assert len(fewer.rows) == 3
    assert len(some) < len(trained)
    (tmp_path / "other.txt").write_text("something else to score")
    _, trained, held = causal(monkeypatch, reader, str(tmp_path / "one.txt"), str(tmp_path / "other.txt"))
    assert held == ["something else to score"]
    assert "word190" in trained


def labeled(reader, rows, task, eval_rows=None, labels=2):
    recipe = asked(data_column="text", data_label_column="label")
    model = bert(num_labels=1 if task == "regression" else labels)
    loaded = load_labeled(recipe, rows, model=model, task=task)
    return load_training_data(recipe, rows, eval_rows, task, model, reader, loaded)


def test_scores_stay_what_they_are_and_other_data_are_scored_on(reader):
    rows = [{"text": f"text {i}", "label": i + 0.5} for i in range(6)]
    made = labeled(reader, rows, "regression", rows[:2])
    assert [row["labels"] for row in made.rows] == [i + 0.5 for i in range(6)]
    assert made.scorer.protocol == "2 rows"
    assert labeled(reader, rows, "regression").scorer.protocol == "1 rows"


def test_a_label_that_is_no_class_is_named(reader):
    rows = [{"text": "text", "label": i} for i in (0, 1, 2)]
    with pytest.raises(DataError, match=r"label 2 in column .label., but the model has 2 classes"):
        labeled(reader, rows, "classification", rows)


def test_padding_is_marked():
    made = TrainingData([], None, 9, {}).collate(
        [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 1},
         {"input_ids": [5], "attention_mask": [1], "labels": 0}]
    )  # fmt: skip
    assert made["input_ids"].tolist() == [[5, 6, 7], [5, 9, 9]]
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert made["labels"].tolist() == [1, 0]


# -- steps -----------------------------------------------------------------------------------------------


class Watching(Recovery):
    """Notes its calls."""

    def __init__(self, of=None, teacher=False):
        self.of, self.seen = of or (lambda outputs, task: task), []
        self.needs_teacher, self.learning_rate = teacher, 1e-2

    def loss(self, outputs, teacher_outputs, batch, task_loss):
        taught = None if teacher_outputs is None else teacher_outputs.logits
        self.seen.append(("loss", self.context.step, batch["input_ids"].clone(), taught))
        return self.of(outputs, task_loss)

    def after_backward(self, model, step):
        self.seen.append(("backward", step, any(p.grad is not None for p in model.parameters())))

    def after_step(self, model, step):
        self.seen.append(("step", step, [p.detach().clone() for p in model.parameters()], drawn()))


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def trained(model, recovery, steps=3, *, task="classification", teacher=None, journal=None, device="cpu", **options):
    given = {"learning_rate": None, "batch_size": 4, "weight_decay": 0.0, "warmup": 0.0, "save_steps": 2, "seed": 0,
             "gradient_accumulation": 1, "gradient_checkpointing": False, "bf16": False}  # fmt: skip
    context = RecoveryContext(teacher, task, SimpleNamespace(**{**given, **options}), steps)
    recovery.prepare(model, context)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * LENGTH} for row in batch(0)["input_ids"]]
    if task != "masked":
        rows = [{**row, "labels": label} for row, label in zip(rows, batch(0)["labels"].tolist(), strict=True)]
    shown = TrainingData(rows[:1] * 16 if task == "masked" else rows, None, 0, {})
    return train(model, recovery, context, shown, READER, torch.device(device), journal)


def test_hooks_are_called_in_order_with_the_step():
    recovery = Watching()
    made = trained(bert(), recovery)
    assert [entry[:2] for entry in recovery.seen] == [
        (what, step) for step in range(3) for what in ("loss", "backward", "step")
    ]
    assert all(entry[2] for entry in recovery.seen if entry[0] == "backward")
    assert made["steps"] == 3


def test_the_loss_is_the_recoverys_and_its_ends_are_reported():
    recovery = Watching(of=lambda outputs, task: 0 * outputs.logits.sum() + 7.0 - recovery.context.step)
    made = trained(bert(), recovery)
    assert (made["first_loss"], made["last_loss"]) == (7, 5)
    with pytest.raises(NumericalError, match="step 1"):
        trained(bert(), Watching(of=lambda outputs, task: task * float("nan")))


def test_decay_rate_and_warmup_are_those_asked_for():
    def still(outputs, task):
        return 0 * outputs.logits.sum()

    for options, factor in (
        ({"weight_decay": 0.5, "learning_rate": 0.1}, 1 - 0.05),
        ({"weight_decay": 0.5}, 1 - 0.005),  # the recovery's own rate
        ({"weight_decay": 0.5, "warmup": 0.5}, 1.0),  # the rate starts at zero
        ({}, 1.0),
    ):
        model, recovery = bert(), Watching(of=still)
        matrix = model.bert.encoder.layer[0].intermediate.dense.weight
        norm, before = model.bert.encoder.layer[0].output.LayerNorm.weight, matrix.detach().clone()
        trained(model, recovery, 2, **options)
        after = next(entry[2] for entry in recovery.seen if entry[0] == "step")
        place = next(i for i, parameter in enumerate(model.parameters()) if parameter is matrix)
        close(after[place], before * factor, 1e-6)
        assert bool((norm == 1).all())


def test_a_teacher_is_in_evaluation_mode_and_gets_no_gradients():
    teacher = bert(hidden_dropout_prob=0.5).train()
    expected = copy.deepcopy(teacher).eval()
    recovery = Watching(teacher=True)
    trained(bert(), recovery, teacher=teacher)
    for _, _, ids, told in (entry for entry in recovery.seen if entry[0] == "loss"):
        assert not told.requires_grad
        with torch.no_grad():
            assert torch.equal(told, expected(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    assert not teacher.training


def test_each_step_masks_other_tokens():
    torch.manual_seed(0)
    recovery = Watching()
    trained(transformers.BertForMaskedLM(bert().config), recovery, task="masked")
    masked = [entry[2] for entry in recovery.seen if entry[0] == "loss"]
    assert not torch.equal(masked[0], masked[1])
    assert not torch.equal(masked[1], masked[2])


def test_a_resumed_training_draws_and_reports_as_an_uninterrupted_one(tmp_path):
    def draws(recovery):
        return [entry[3] for entry in recovery.seen if entry[0] == "step"]

    whole, broken, resumed = Watching(), Watching(), Watching()
    states = [random.getstate(), np.random.get_state(), torch.get_rng_state()]

    def run(recovery, folder, **more):
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        model = bert()
        made = trained(model, recovery, 6, journal=Journal.open(tmp_path / folder, {}, restart=False), **more)
        return made, model

    first, model = run(whole, "whole")
    with interrupted(6):
        run(broken, "broken")
    random.seed(17)
    second, again = run(resumed, "broken")
    assert draws(resumed) == draws(whole)[4:]
    assert second["resumed_from"] == 4
    assert [first[key] for key in ("first_loss", "last_loss")] == [second[key] for key in ("first_loss", "last_loss")]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_models_and_batches_lie_on_the_one_device_that_is_given():
    student, teacher, found = bert(), bert(), []

    def stop(module, given, named):
        found.extend(tensor.device.type for tensor in named.values() if isinstance(tensor, torch.Tensor))
        raise KeyboardInterrupt

    student.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        trained(student, Watching(teacher=True), teacher=teacher, device="meta")
    found += [tensor.device.type for model in (student, teacher) for tensor in model.parameters()]
    assert len(found) > 40
    assert set(found) == {"meta"}


def test_rows_of_like_length_make_batches_in_random_order():
    lengths = random.Random(0).choices(range(3, 60), k=203)

    def padding(batches):
        return sum(len(rows) * max(lengths[i] for i in rows) - sum(lengths[i] for i in rows) for rows in batches)

    batches = epoch_batches(lengths, 8, 0, 0)
    assert sorted(row for rows in batches for row in rows) == list(range(203))
    assert [*map(len, batches)] == [8] * 25 + [3]
    shuffled = random.Random(1).sample(range(203), 203)
    assert padding(batches) < 0.2 * padding([shuffled[i : i + 8] for i in range(0, 203, 8)])
    longest = [max(lengths[i] for i in rows) for rows in batches]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))
    orders = [batches, epoch_batches(lengths, 8, 1, 0), epoch_batches(lengths, 8, 0, 1)]
    assert epoch_batches(lengths, 8, 0, 0) == batches
    assert all(one != other for one, other in combinations(orders, 2))


# -- distillation ----------------------------------------------------------------------------------------


def made_up_outputs(seed, layers=2):
    """Made-up outputs of a model of two layers."""
    stream = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        logits=torch.randn(2, 3, 5, generator=stream),
        hidden_states=[torch.randn(2, 3, 4, generator=stream) for _ in range(1 + layers)],
        attentions=[torch.randn(2, 2, 3, 3, generator=stream).softmax(-1) for _ in range(layers)],
    )


def recovery_of(kind="causal", name="distil", **weights):
    recovery = make_recovery(name, {**dict.fromkeys(TERMS, "0"), **weights})
    recovery.context, recovery._temperature = RecoveryContext(None, kind, None, 8), 2.0
    return recovery


MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def of_real(values):
    return (values * MASK).sum() / 4


def test_each_term_of_distillation_by_its_formula_and_weight():
    mine, its = made_up_outputs(1), made_up_outputs(2)
    squares = [of_real((a - b).square().mean(-1)) for a, b in zip(mine.hidden_states, its.hidden_states, strict=True)]
    p, q = (its.logits / 2).softmax(-1), (mine.logits / 2).softmax(-1)
    pairs = list(zip(mine.attentions, its.attentions, strict=True))
    kl = [of_real((b * (b / a).log()).sum(-1).mean(1)) for a, b in pairs]
    mse = [of_real((b - a).square().mean((1, 3))) for a, b in pairs]
    task = torch.tensor(1.5)
    wanted = {
        "logits": 4 * of_real((p * (p / q).log()).sum(-1)),
        "hidden": (squares[1] + squares[2]) / 2,
        "embedding": squares[0],
        "attention": (kl[0] + kl[1]) / 2,
        "task": task,
    }
    for name, value in wanted.items():
        recovery = recovery_of(**{name: "3"})
        close(recovery.loss(mine, its, {"attention_mask": MASK}, task), 3 * value, 1e-5)
    recovery = recovery_of(attention="1", attention_loss="mse")
    close(recovery.loss(mine, its, {"attention_mask": MASK}, task), (mse[0] + mse[1]) / 2, 1e-5)
    every = recovery_of(**dict.fromkeys(wanted, "1"))
    close(every.loss(mine, its, {"attention_mask": MASK}, task), sum(wanted.values()), 1e-5)


def test_layers_are_mapped_and_padding_is_left_out():
    recovery = make_recovery("distil", {"logits": "0"})
    deep = [torch.full((1, 3, 4), float(i)) for i in range(5)]
    shallow = [deep[0], deep[2].clone(), deep[4].clone()]
    for layer in shallow:
        layer[:, 2] = 99.0
    outputs, theirs = SimpleNamespace(hidden_states=shallow), SimpleNamespace(hidden_states=deep)
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert float(recovery.loss(outputs, theirs, batch, torch.zeros(()))) == 0
    assert float(recovery.loss(outputs, theirs, {}, torch.zeros(()))) > 0


def test_scores_are_compared_by_their_distance():
    mine, its = (SimpleNamespace(logits=torch.randn(4, 1)) for _ in range(2))
    found = recovery_of("regression", logits="2").loss(mine, its, {}, torch.zeros(()))
    close(found, 2 * functional.mse_loss(mine.logits, its.logits), 1e-6)


def test_first_features_then_logits():
    recovery = recovery_of(name="noach-goldberg", hidden="1", embedding="1", logits="1", task="1", first_stage="0.25")
    stages = []
    for step in range(8):
        recovery.context.step = step
        stages.append(recovery.active())
    assert stages == [("hidden", "embedding")] * 2 + [("logits", "task")] * 6


def test_temperature_is_the_recipes_unless_the_recovery_has_one():
    for options, wanted in (({}, 3.0), ({"temperature": "5"}, 5.0)):
        recovery = make_recovery("distil", options)
        recovery.prepare(bert(), RecoveryContext(bert(), "classification", SimpleNamespace(temperature=3.0), 1))
        assert recovery.report()["temperature"] == wanted


# -- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "words"), [
    ("lora", {"rank": "0"}, r"lora: rank must be in \[1, inf\), not 0; the default is --recovery-option rank=8"),
    ("lora", {"dropout": "1"}, r"dropout must be in \[0, 1\), not 1"),
    ("dsee", {"heads": "1"}, r"dsee: heads must be in \[0, 1\), not 1"),
    ("dsee", {"prune": "heads"}, "prune must be one of none, unstructured, structured, not 'heads'"),
    ("distil", {"attention_loss": "l1"}, "one of kl, mse"),
    ("distil", {"hidden": "-1"}, r"hidden must be in \[0, inf\)"),
    ("distil", {"hidden": "0", "logits": "0", "sentence": "0"}, "nothing to minimize"),
    ("distil", {"temperature": "0"}, r"temperature must be in \(0, inf\)"),
    ("noach-goldberg", {"first_stage": "1.5"}, r"first_stage must be in \[0, 1\]"),
    ("losparse", {"keep": "1"}, r"keep must be in \(0, 1\)"),
    ("losparse", {"low_rank": "0.5"}, r"low_rank must be in \[0, 0\.2\]"),
    ("losparse-distil", {"layers": "-1"}, r"layers must be in \[0, inf\)"),
])  # fmt: skip
def test_a_setting_out_of_range_is_named(name, options, words):
    with pytest.raises(UsageError, match=words):
        make_recovery(name, options)


def test_the_ends_of_a_range_are_inside():
    recovery = make_recovery("dsee", {"prune_at": "1", "fraction": "0", "positions": "0", "rank": "1"})
    assert (recovery.prune_at, recovery.fraction, recovery.positions, recovery.rank) == (1, 0, 0, 1)


# -- adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "scale"), [({}, 2.0), ({"alpha": "12"}, 3.0)])
def test_adapters_are_scaled_and_the_head_is_trained(options, scale):
    from peft.tuners.lora import LoraLayer

    model = bert()
    recovery = make_recovery("lora", {"rank": "4", "dropout": "0.25", **options})
    recovery.prepare(model, RecoveryContext(None, "classification", None, 1, ("classifier",)))
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert adapted
    assert {module.scaling["default"] for module in adapted} == {scale}
    assert {module.lora_dropout["default"].p for module in adapted} == {0.25}
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trains if "lora_" not in name} == {"classifier.weight", "classifier.bias"}
    recovery.finish(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tied_weights_get_no_adapter():
    model = transformers.GPT2LMHeadModel(gpt2().config)
    assert model.lm_head.weight is model.transformer.wte.weight
    recovery = make_recovery("lora", {"rank": "2"})
    recovery.prepare(model, RecoveryContext(None, "causal", None, 1))
    assert recovery.targets
    assert "lm_head" not in recovery.targets
    assert len(model.lm_head.weight) == VOCABULARY
