"""Errors of blocks count by what the model's output loses: the metric, and who reads it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import BY_NAME
from test_calibration_backward import without_backward
from test_compression_refine import SMALL, TEXTS, Pair
from test_recovery_block import trained
from tiny import DEMO, llama
from torch import Tensor
from transformers import AutoTokenizer

import eckart
from eckart.calibration.layerwise import LayerwiseError
from eckart.compression import output_metrics, refine
from eckart.compression.output_metrics import ALL, STAGE, metric_factor
from eckart.compression.refine_blocks import BlockRefinement, without_gradients
from eckart.compression.train_block import BlockTraining
from eckart.data import load_data
from eckart.data.inference import evaluating
from eckart.errors import ModelError, UsageError
from eckart.recovery import Block, RecoveryContext
from eckart.recovery.recipe import TuneRecipe
from eckart.storage.cache import Cache
from eckart.storage.store import MemoryStore


def fisher(n: int = 5, tokens: int = 3) -> Tensor:
    """Of fewer tokens than directions: most errors have no weight of their own."""
    rows = torch.randn(tokens, n, generator=torch.Generator().manual_seed(0)).double()
    return rows.T @ rows


def test_the_metric_is_the_fisher_information_and_a_share_of_the_plain_error():
    sums = fisher()
    factor = metric_factor(sums, 0.1)
    assert factor.dtype == torch.float32
    true = 0.9 * sums / sums.diagonal().mean() + 0.1 * torch.eye(5)
    assert factor.double() @ factor.double().T == pytest.approx(true, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_only_the_directions_of_gradients_count(scale: float):
    assert metric_factor(scale * fisher()) == pytest.approx(metric_factor(fisher()), rel=1e-5, abs=1e-7)


def test_the_plain_error_alone_counts_all_alike():
    assert torch.equal(metric_factor(fisher(), 1.0), torch.eye(5))


def test_an_error_counts_by_the_metric():
    pair = Pair()
    n = pair.model.config.hidden_size
    factor = metric_factor(fisher(n, 4))
    work = BlockRefinement(pair.work.before, pair.work.now, pair.text, training=BlockTraining(epochs=3),
                           metrics={0: factor}.get)  # fmt: skip
    with evaluating(pair.model, pair.changed), without_gradients(pair.changed):
        work.follow(0)
        found = work.train(0)
        outside = [b for b in pair.text.batches if set(b.examples) <= set(sum(pair.text.held, ()))]
        made: list[Tensor] = []
        for model in (pair.model, pair.changed):
            model.model.layers[0].register_forward_hook(lambda *seen: made.append(seen[-1]))
            for batch in outside:
                model(**batch.inputs)
    assert found is not None
    true, now = torch.cat(made[: len(outside)]), torch.cat(made[len(outside) :])
    wrong, power = (((x @ factor).square().sum()) for x in (true - now, true))
    assert found[1].before == pytest.approx(float(wrong / power), rel=1e-3)
    assert found[1].after < found[1].before


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[int], Tensor | None]]:
    """What blocks are trained with."""
    found: list[Any] = []
    own = BlockRefinement.run

    def run(self: BlockRefinement, *rest: Any) -> None:
        found.append(self.metrics)
        own(self, *rest)

    monkeypatch.setattr(BlockRefinement, "run", run)
    monkeypatch.setattr(refine, "TRAINING", BlockTraining(epochs=1))
    return found


def refined(model: Any, **options: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    how = {"data": TEXTS, "method": "drone", "keep": 0.5, "refine": True, **SMALL}
    return eckart.compress(model, tokenizer, **how | options)


def test_compress_weighs_the_errors_of_every_block(seen: list[Any]):
    told: list[str] = []
    result = refined(llama(num_hidden_layers=2), report_progress=told.append)
    (metrics,) = seen
    for step in range(2):
        factor = metrics(step)
        weights = factor @ factor.T
        assert float(weights.diagonal().mean()) == pytest.approx(1, rel=1e-3)
        assert float((weights - torch.eye(len(weights))).norm()) > 0.3
    assert not any(output_metrics.ALL_ALIKE in note for note in result.report["notes"])


def test_where_no_backward_pass_runs_that_is_said_before_the_work():
    batches = BY_NAME["llama"].batches(rows=4, count=4)
    how: dict[str, Any] = {"data": batches, "method": "asvd", "keep": 0.6}
    with pytest.raises(UsageError, match=r"--refine: no backward pass runs .*this kernel has no backward pass"):
        eckart.compress(without_backward(), refine=True, **how)
    notes = eckart.compress(without_backward(), effort="best", **how).report["notes"]
    assert any("the refinement was left out: no backward pass" in note for note in notes)
    teacher = without_backward()
    with pytest.raises(ModelError, match=r"recovery block: no backward pass runs .*--recovery refit"):
        trained(teacher, teacher, load_data(batches, model=teacher).batches)


def test_a_model_that_does_not_run_backwards_block_by_block_is_named(seen: list[Any], monkeypatch: pytest.MonkeyPatch):
    def refuse(*rest: Any) -> Any:
        raise LayerwiseError("a branch")

    monkeypatch.setattr(output_metrics, "gather_output_fisher", refuse)
    notes = refined(llama(num_hidden_layers=2)).report["notes"]
    assert any(output_metrics.ALL_ALIKE in note and "a branch" in note for note in notes)
    assert seen[0](0) is None


def test_the_recovery_weighs_them_too_and_finds_them_again(seen: list[Any], monkeypatch: pytest.MonkeyPatch):
    kind = BY_NAME["llama"]
    teacher = kind.model()
    batches = load_data(kind.batches(rows=8, count=4), model=teacher).batches
    student = eckart.compress(teacher, data=batches, method="svd", keep=0.5).model
    journal = MemoryStore()

    def solve() -> None:
        with torch.no_grad():
            Block(epochs=1).solve(
                student.eval(), RecoveryContext(teacher, "causal", TuneRecipe(), 0, journal=journal), batches,
                Cache(memory=sys.maxsize, folder=None),
            )  # fmt: skip

    solve()
    assert sorted(journal.entries(STAGE)) == ["0", "1", ALL]
    assert seen[0](1) is not None
    calls: list[Any] = []
    own = output_metrics.gather_output_fisher
    monkeypatch.setattr(output_metrics, "gather_output_fisher", lambda *rest: calls.append(rest) or own(*rest))
    solve()
    assert len(calls) == 1  # that of the trial
    assert torch.equal(seen[1](1), seen[0](1))
