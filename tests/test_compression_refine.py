"""Blocks trained one after another beside the original's: what is trained, on what, and which model is kept."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import BY_NAME
from test_calibration_backward import without_backward
from tiny import DEMO, llama
from torch import Tensor, nn
from transformers import AutoTokenizer

import eckart
from eckart.calibration.layerwise import LayerwiseRunner, trace_blocks
from eckart.compression import refine
from eckart.compression.output_error import OutputError, distance_by_token
from eckart.compression.refine_blocks import (
    BlockRefinement,
    left_as_they_are,
    put_values,
    without_gradients,
)
from eckart.compression.train_block import BlockTraining, part_of_rate, train_block
from eckart.compression.training_text import TrainingText
from eckart.data import Batch
from eckart.data.inference import evaluating, forward
from eckart.distributed import Processes
from eckart.errors import NumericalError, UsageError
from eckart.evaluation.output_distance import OutputDistance
from eckart.storage.cache import Cache

# -- one block, as tensors -----------------------------------------------------------------------------------


def problem() -> tuple[nn.Parameter, list[Tensor], Any]:
    """Inputs of a linear map that is to become the identity, and its error."""
    random = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 4, generator=random) for _ in range(6)]
    weight = nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4, generator=random))

    def error(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x @ weight - x).square().sum(), x.square().sum()

    return weight, batches, error


def train(weight: nn.Parameter, batches: list[Tensor], error: Any, **how: Any) -> Any:
    return train_block([weight], [[b] for b in batches[1:]], batches[:1], error, BlockTraining(**how), Processes())


def test_training_brings_a_block_nearer_and_says_how_near_it_is():
    weight, batches, error = problem()
    with torch.no_grad():
        wrong, power = error(batches[0])
    fit = train(weight, batches, error, epochs=20)
    assert fit.before == pytest.approx(float(wrong / power), rel=1e-5)
    with torch.no_grad():
        wrong, power = error(batches[0])
    assert fit.after == pytest.approx(float(wrong / power), rel=1e-5)
    assert fit.after < fit.before / 10


def test_the_epoch_with_the_least_error_on_held_out_text_is_kept():
    _, batches, _ = problem()
    weight = nn.Parameter(torch.eye(4))
    held = batches[:1]

    def lying(x: Tensor) -> tuple[Tensor, Tensor]:
        """On what is trained on, another map is right."""
        sign = -1 if x is held[0] else 1
        return (x @ weight + sign * x).square().sum(), x.square().sum()

    fit = train_block([weight], [[b] for b in batches[1:]], held, lying, BlockTraining(epochs=3), Processes())
    assert fit.epoch == 0
    assert fit.after == fit.before
    assert torch.equal(weight, torch.eye(4))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_learning_rate_follows_the_size_of_a_parameter(scale: float):
    weight, batches, error = problem()
    fit = train(weight, batches, error, epochs=3)
    other, _, _ = problem()
    with torch.no_grad():
        other.mul_(scale)

    def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
        return ((x @ other) / scale - x).square().sum(), x.square().sum()

    again = train(other, batches, scaled, epochs=3, least=0.0)
    assert again.after == pytest.approx(fit.after, rel=1e-2)


def test_a_block_that_is_off_by_nothing_stays():
    weight, batches, error = problem()
    before = weight.detach().clone()
    fit = train_block([weight], [[b] for b in batches[1:]], batches[:1], error, BlockTraining(), Processes(), 0.0)
    assert fit.epoch == 0
    assert torch.equal(weight, before)


def test_every_step_leaves_a_mark_by_which_others_see_that_a_weight_has_changed():
    weight, batches, error = problem()
    seen = []

    def looking(x: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            seen.append((weight._version, weight.detach().clone()))
        return error(x)

    train(weight, batches, looking, epochs=3)
    assert len(seen) == 4
    for (mark, value), (later, changed) in pairwise(seen):
        assert not torch.equal(value, changed)
        assert mark < later


def test_a_parameter_of_zeros_moves():
    bias = nn.Parameter(torch.zeros(4))

    def error(x: Tensor) -> tuple[Tensor, Tensor]:
        return (bias - 0.001).expand_as(x).square().sum(), x.square().sum()

    fit = train(bias, problem()[1], error, epochs=20, rate=1000.0, largest=0.1)
    assert fit.after < fit.before / 10


def test_the_rate_rises_for_a_tenth_and_falls_to_a_tenth():
    parts = [part_of_rate(step, 100, BlockTraining()) for step in range(100)]
    assert parts[0] == 0.1
    assert parts[9:11] == [1.0, 1.0]
    assert parts[55] == pytest.approx(0.55)
    assert parts[-1] == pytest.approx(0.1, abs=0.001)


# -- the text --------------------------------------------------------------------------------------------------


def test_steps_are_the_same_for_any_number_of_processes():
    inputs = BY_NAME["bert"].batches(9, 4)
    batches = [Batch(values, tuple(range(9 * i, 9 * i + 9))) for i, values in enumerate(inputs)]
    alone = TrainingText.of(batches, Processes())
    parts = [TrainingText.of(batches, Processes(rank=rank, size=2)) for rank in range(2)]
    assert alone is not None
    assert all(part is not None and (part.steps, part.held) == (alone.steps, alone.held) for part in parts)
    rows = [row for part in parts if part is not None for batch in part.batches for row in batch.examples]
    assert sorted(rows) == list(range(36)) == sorted(sum(alone.steps + alone.held, ()))
    assert not set(alone.steps) & set(alone.held)
    assert len(alone.steps) > 4 * len(alone.held) > 0
    assert max(map(len, alone.steps)) <= 3


# -- the blocks of a model -----------------------------------------------------------------------------------


class Pair:
    """A model, a changed copy of it, and a refinement of the copy."""

    def __init__(self, name: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        kind = BY_NAME[name]
        self.model, self.changed = kind.model().to(dtype), kind.model().to(dtype)
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.changed.parameters():
                p.add_(0.1 * p.square().mean().sqrt() * torch.randn(p.shape, generator=random))
        batches = [Batch(b, tuple(range(8 * i, 8 * i + 8))) for i, b in enumerate(kind.batches(8, 4))]
        text = TrainingText.of(batches, Processes())
        assert text is not None
        self.text = text
        self.store = Cache(sys.maxsize, None)
        before, now = (self.runner(model, name) for model, name in ((self.model, "before"), (self.changed, "now")))
        self.work = BlockRefinement(before, now, text, training=BlockTraining(epochs=3))

    def runner(self, model: Any, name: str) -> LayerwiseRunner:
        def run(batch: Batch) -> Any:
            return forward(model, batch.inputs)

        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        with evaluating(model):
            chain = trace_blocks(model, names, run, self.text.batches[0].rows(0, 1), self.store)
        return LayerwiseRunner(chain, self.text.batches, self.store, name=name)

    def train(self, step: int) -> Any:
        self.work.follow(step)
        return self.work.train(step)


class Heard(Processes):
    """Hears what is told to the other processes."""

    def raise_if_any_failed(self, error: BaseException | None) -> None:
        heard.append(error)
        super().raise_if_any_failed(error)


heard: list[BaseException | None] = []


def test_what_fails_on_the_rows_of_one_process_is_told_to_the_others(monkeypatch: pytest.MonkeyPatch):
    pair, failure = Pair(), NumericalError("a row of this process")
    work = replace(pair.work, processes=Heard())

    def fail(*_: Any) -> None:
        raise failure

    with evaluating(pair.model, pair.changed), without_gradients(pair.changed):
        for runner, run in ((work.before, work.follow), (work.now, work.advance)):
            heard.clear()
            run(0)
            assert heard == [None]
            monkeypatch.setattr(runner, "run_block", fail)
            with pytest.raises(NumericalError):
                run(1)
            assert heard == [None, failure]


def test_the_target_is_what_the_original_puts_out_on_its_own_inputs():
    pair = Pair()
    with evaluating(pair.model, pair.changed), without_gradients(pair.changed):
        values, fit = pair.train(0)
        put_values(pair.changed, pair.work.now.schedule.steps[0], values)
        pair.work.advance(0)
        found = pair.train(1)
        assert found is not None
        values, fit = found
        put_values(pair.changed, pair.work.now.schedule.steps[1], values)
        outside = [b for b in pair.text.batches if set(b.examples) <= set(sum(pair.text.held, ()))]
        made: list[Tensor] = []
        for model in (pair.model, pair.changed):
            model.model.layers[1].register_forward_hook(lambda *seen: made.append(seen[-1]))
            for batch in outside:
                model(**batch.inputs)
    true, now = torch.cat(made[: len(outside)]), torch.cat(made[len(outside) :])
    wrong, power = float((true - now).square().sum()), float(true.square().sum())
    assert fit.after == pytest.approx(wrong / power, rel=1e-3)
    assert fit.after < 0.8 * fit.before


def test_of_the_last_block_the_distance_of_the_outputs_is_made_small():
    pair = Pair()
    work = replace(pair.work, distance=OutputDistance("classes"))
    with evaluating(pair.model, pair.changed), without_gradients(pair.changed):
        work.follow(0)
        work.advance(0)
        work.follow(1)
        found = work.train(1)
        assert found is not None
        values, fit = found
        kl = []
        for put in (lambda: None, lambda: put_values(pair.changed, "model.layers.1", values)):
            put()
            held = [batch for batch in pair.text.batches if batch.examples in pair.text.held]
            true, now = (
                torch.cat([model(**batch.inputs).logits for batch in held]).log_softmax(-1)
                for model in (pair.model, pair.changed)
            )
            kl.append(float((true.exp() * (true - now)).sum(-1).mean()))
    assert [fit.before, fit.after] == pytest.approx(kl, rel=1e-4)
    assert fit.after < 0.95 * fit.before


@pytest.mark.parametrize(("name", "kind"), [
    ("llama", "classes"), ("bert-mlm", "classes"), ("t5", "classes"), ("bert", None), ("bert-classes", None),
    ("vit", None),
])  # fmt: skip
def test_outputs_are_compared_where_each_token_is_predicted(name: str, kind: str | None):
    model = BY_NAME[name].model()
    (inputs,) = BY_NAME[name].batches(4, 1)
    with evaluating(model):
        found = distance_by_token(model, Batch(inputs, (0, 1, 2, 3)), None)
    assert (found and found.kind) == kind


@pytest.mark.parametrize(("source", "target"), [(1, 1), (30, 1), (2, 30)])
def test_how_many_tokens_are_predicted_does_not_matter(source: int, target: int):
    model = BY_NAME["t5"].model()
    inputs = {"input_ids": torch.full((1, source), 5), "attention_mask": torch.ones(1, source, dtype=torch.long)}
    inputs |= {"decoder_input_ids": torch.full((1, target), 5)}
    with evaluating(model):
        found = distance_by_token(model, Batch(inputs, (0,)), None)
    assert found is not None


def test_the_sum_and_the_number_of_rows_are_where_the_outputs_are():
    rows, model = torch.empty(6, 7, device="meta"), BY_NAME["llama"].model()
    distance: Any = SimpleNamespace(rows=lambda *_: [rows])
    error = OutputError(distance, model, model, lambda _: None, lambda _: None, torch.device("cpu"))
    found = error(Batch({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, (0, 1)))
    assert {value.device.type for value in found} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_multiply_as_the_original_is_stored_and_what_is_held_out_is_measured_in_float32(dtype: torch.dtype):
    pair = Pair(dtype=dtype)
    pair.changed.float()
    seen: set[tuple[bool, torch.dtype]] = set()
    layer = pair.changed.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, args, output: seen.add((torch.is_grad_enabled(), output.dtype)))
    with evaluating(pair.model, pair.changed), without_gradients(pair.changed):
        found = pair.train(0)
    assert seen == {(True, dtype), (False, torch.float32)}
    assert found is not None
    values, fit = found
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert fit.after < 0.8 * fit.before


def test_padding_does_not_count():
    pair = Pair("bert")
    padded = pair.text.batches[0]
    assert not padded.inputs["attention_mask"].all()
    with evaluating(pair.model, pair.changed), without_gradients(pair.changed):
        found = pair.train(0)
        assert found is not None
        other = Pair("bert")
        for batch in other.text.batches:
            hidden = batch.inputs["attention_mask"] == 0
            batch.inputs["input_ids"][hidden] = (batch.inputs["input_ids"][hidden] + 7) % 90
        again = other.train(0)
    assert again is not None
    assert again[1].after == pytest.approx(found[1].after, rel=1e-4)


def test_a_model_stays_as_it_is_but_for_what_is_put_into_it():
    pair = Pair()
    before = {name: p.detach().clone() for name, p in pair.changed.named_parameters()}
    flags = {name: p.requires_grad for name, p in pair.changed.named_parameters()}
    objects = {name: id(p) for name, p in pair.changed.named_parameters()}
    with evaluating(pair.model, pair.changed), without_gradients(pair.changed):
        values, _ = pair.train(0)
    after = dict(pair.changed.named_parameters())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in after.items())
    assert {name: id(p) for name, p in after.items()} == objects
    assert {name: p.requires_grad for name, p in after.items()} == flags
    assert set(values) == {n.removeprefix("model.layers.0.") for n in before if n.startswith("model.layers.0.")}
    put_values(pair.changed, "model.layers.0", values)
    assert torch.equal(pair.changed.model.layers[0].mlp.up_proj.weight, values["mlp.up_proj.weight"])
    assert not torch.equal(values["mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert all(p.requires_grad for p in pair.changed.parameters())


def test_what_other_blocks_hold_too_is_not_trained():
    pair = Pair()
    layers = pair.changed.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    layers[0].self_attn.k_proj.weight = layers[0].self_attn.v_proj.weight  # inside it is one parameter, in two places
    with evaluating(pair.model, pair.changed), without_gradients(pair.changed):
        values, _ = pair.train(0)
        assert "mlp.up_proj.weight" not in values
        assert "mlp.gate_proj.weight" in values
        assert ("self_attn.k_proj.weight" in values) != ("self_attn.v_proj.weight" in values)
        put_values(pair.changed, "model.layers.0", values)
    assert layers[0].self_attn.k_proj.weight is layers[0].self_attn.v_proj.weight
    assert layers[1].mlp.up_proj.weight is layers[0].mlp.up_proj.weight
    (note,) = left_as_they_are(pair.work.now)
    assert "model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight" in note
    assert left_as_they_are(pair.work.before) == []


# -- a compression -------------------------------------------------------------------------------------------

TEXTS = [f"def add_{n}(x):\n    return x + {n}\n" * 3 for n in range(100)]
SMALL: dict[str, Any] = {"num_samples": 12, "max_seq_length": 24, "batch_size": 4}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "TRAINING", BlockTraining(epochs=3))
    monkeypatch.setattr("eckart.compression.prepare.REFINED", 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_report_says_what_each_stage_brought(model: Any, tokenizer: Any, dtype: str):
    told: list[str] = []
    result = eckart.compress(
        model, tokenizer, data=TEXTS, keep=0.5, refine=True, dtype=dtype, report_progress=told.append, **SMALL
    )
    assert "2 blocks, 3 passes of" in "\n".join(told)
    rows = {row["stage"]: row["distance"] for row in result.report["stages"]}
    assert list(rows) == ["factors", "refit", "refinement"]
    assert rows["refinement"] < rows["refit"] < rows["factors"]
    assert result.report["quality"]["agreement"]["kl"] == rows["refinement"]
    assert f"refinement {rows['refinement']:.4f}" in str(result)
    assert {p.dtype for p in result.model.parameters()} == {getattr(torch, dtype)}


def test_the_better_model_is_kept(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    how: dict[str, Any] = {"data": TEXTS, "method": "drone", "keep": 0.5, **SMALL}
    before = eckart.compress(model, tokenizer, **how)

    def spoil(model: Any, block: str, values: dict[str, Tensor]) -> None:
        put_values(model, block, {name: value * 0.5 for name, value in values.items()})

    monkeypatch.setattr(refine, "put_values", spoil)
    result = eckart.compress(model, tokenizer, refine=True, **how)
    rows = result.report["stages"]
    assert [(row["stage"], row["kept"]) for row in rows] == [("factors", True), ("refinement", False)]
    assert result.report["quality"] == before.report["quality"]
    theirs = before.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in result.model.state_dict().items())
    assert any("the refinement was left out: held-out distance" in note for note in result.report["notes"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"data": TEXTS[:1], "num_samples": 1}, "too little text"),
        ({"model": "albert"}, "one and the same block"),
        ({"model": "alone"}, "cannot be run block by block"),
    ],
)
def test_what_cannot_be_refined_is_refused_with_the_reason(model: Any, tokenizer: Any, change: Any, why: str):
    options = {"data": TEXTS, "method": "drone", "keep": 0.5, "refine": True, **SMALL, **change}
    which = options.pop("model", None)
    if which == "albert":
        kind = BY_NAME["albert"]
        options |= {"data": kind.batches()}
        model = kind.model()
    elif which == "alone":
        model = llama(num_hidden_layers=1)
    with pytest.raises(UsageError, match=why):
        eckart.compress(model, tokenizer, **options)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The contexts of refinements, which train nothing."""
    found: list[Any] = []

    def leave_out(context: Any, seed: int, compressed: Any, assembly: Any) -> Any:
        found.append(context)
        return compressed, []

    monkeypatch.setattr("eckart.compression.prepare.REFINED", 3)
    monkeypatch.setattr(refine, "refine_model", leave_out)
    return found


MORE: dict[str, Any] = {"data": TEXTS * 4, "keep": 0.5, "method": "drone", "refine": True, **SMALL}


@pytest.mark.parametrize(("samples", "read", "passes"), [(None, 36, 2), (24, 24, 3), (4, 4, 18)])
def test_of_more_text_fewer_passes_are_made(
    model: Any, tokenizer: Any, monkeypatch: Any, prepared: Any, samples: int | None, read: int, passes: int
):
    monkeypatch.setattr(refine, "TRAINING", BlockTraining(epochs=6))
    told: list[str] = []
    result = eckart.compress(model, tokenizer, refine_samples=samples, report_progress=told.append, **MORE)
    assert (prepared[0].data.num_examples, prepared[0].refining.num_examples) == (12, read)
    assert f"2 blocks, {passes} passes of" in "\n".join(told)
    assert result.report["data"]["calibration_examples"] == 12


def test_where_no_backward_pass_runs_the_model_stays_and_that_is_said():
    batches = BY_NAME["llama"].batches(rows=4, count=4)
    how: dict[str, Any] = {"data": batches, "method": "asvd", "keep": 0.6}
    result, plain = (eckart.compress(without_backward(), refine=refine, **how) for refine in (True, False))
    assert any("left out: " in note and "this kernel has no backward pass" in note for note in result.report["notes"])
    assert all(torch.equal(value, plain.model.state_dict()[key]) for key, value in result.model.state_dict().items())


def test_what_is_held_out_is_not_trained_on(model: Any, tokenizer: Any, prepared: Any):
    eckart.compress(model, tokenizer, **MORE)
    calibrating, refining, held = (
        {example for batch in part.batches for example in batch.examples}
        for part in (prepared[0].data, prepared[0].refining, prepared[0].held_out)
    )
    assert calibrating < refining
    assert held
    assert not held & refining


def test_batches_that_the_user_made_all_calibrate(model: Any, prepared: Any):
    batches = [{"input_ids": torch.randint(0, 90, (8, 12))} for _ in range(36)]
    eckart.compress(model, data=batches, keep=0.5, method="drone", refine=True)
    context = prepared[0]
    assert context.data.num_examples == context.refining.num_examples == 288 - context.held_out.num_examples


def test_samples_for_no_refinement_are_refused(model: Any, tokenizer: Any):
    with pytest.raises(UsageError, match="--refine-samples"):
        eckart.compress(model, tokenizer, data=TEXTS, keep=0.5, refine_samples=24, **SMALL)
