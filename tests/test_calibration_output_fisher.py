"""The Fisher information of what blocks put out: what one whole backward pass gives, without padding."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import BY_NAME
from torch import Tensor
from transformers import PreTrainedModel

from eckart.calibration.layerwise import LayerwiseRunner, all_blocks, gather_output_fisher, trace_blocks
from eckart.data import Batch, load_data
from eckart.data.inference import evaluating, forward
from eckart.moments import real_tokens
from eckart.storage.cache import Cache


def loss_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """To which every real token adds a term of its own."""
    rows = real_tokens(forward(model, batch.inputs)[0], batch)
    return (rows.sin() * torch.arange(1, rows.shape[-1] + 1) / rows.shape[-1]).sum()


@pytest.fixture(params=["llama", "bert", "mixtral", "gpt2"])
def case(request: pytest.FixtureRequest) -> Iterator[tuple[PreTrainedModel, list[Batch]]]:
    kind = BY_NAME[request.param]
    model = kind.model()
    with evaluating(model):
        yield model, load_data(kind.batches(rows=3), model=model).batches


def runner_of(model: PreTrainedModel, batches: list[Batch]) -> LayerwiseRunner:
    def run(batch: Batch) -> Any:
        return loss_of(model, batch) if torch.is_grad_enabled() else forward(model, batch.inputs)

    store = Cache(sys.maxsize, None)
    chain = trace_blocks(model, all_blocks(model), run, batches[0].rows(0, 1), store, backward=True)
    return LayerwiseRunner(chain, batches, store, name="fisher")


def by_a_whole_pass(model: PreTrainedModel, batches: list[Batch]) -> list[Tensor]:
    made: list[Tensor] = []

    def keep(*seen: Any) -> None:
        output = seen[-1] if isinstance(seen[-1], Tensor) else seen[-1][0]
        output.retain_grad()
        made.append(output)

    blocks = all_blocks(model)
    hooks = [model.get_submodule(name).register_forward_hook(keep) for name in blocks]
    sums = [torch.zeros(()).double()] * len(blocks)
    for batch in batches:
        made.clear()
        with torch.enable_grad():
            loss_of(model, batch).backward()
        rows = [real_tokens(output.grad, batch).double() for output in made if output.grad is not None]
        sums = [total + row.T @ row for total, row in zip(sums, rows, strict=True)]
    for hook in hooks:
        hook.remove()
    return sums


def test_it_is_that_of_one_whole_backward_pass(case: tuple[PreTrainedModel, list[Batch]]):
    model, batches = case
    found = list(gather_output_fisher(runner_of(model, batches)))
    true = by_a_whole_pass(model, batches)
    assert [step for step, _ in found] == [1, 0]
    for step, fisher in found:
        assert fisher is not None
        assert fisher.dtype == torch.float64
        assert (fisher - true[step]).norm() <= 1e-4 * true[step].norm()


def test_what_runs_out_of_memory_runs_in_halves(
    case: tuple[PreTrainedModel, list[Batch]], monkeypatch: pytest.MonkeyPatch
):
    model, batches = case
    whole = dict(gather_output_fisher(runner_of(model, batches)))
    own = LayerwiseRunner.run_block_backward
    rows: list[int] = []

    def small(self: LayerwiseRunner, step: int, batch: Batch, *rest: Any) -> None:
        rows.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no more")
        own(self, step, batch, *rest)

    monkeypatch.setattr(LayerwiseRunner, "run_block_backward", small)
    for step, fisher in gather_output_fisher(runner_of(model, batches)):
        assert fisher is not None
        assert (fisher - whole[step]).norm() <= 1e-4 * whole[step].norm()
    assert max(rows) == 3
    assert min(rows) < 3


def test_a_loss_that_does_not_depend_on_a_block_gives_none():
    model = BY_NAME["llama"].model()
    batches = load_data(BY_NAME["llama"].batches(rows=2), model=model).batches
    with evaluating(model):
        runner = runner_of(model, batches)
        weight = model.lm_head.weight

        def run(batch: Batch) -> Any:
            forward(model, batch.inputs)
            return weight.detach().requires_grad_().sum()

        runner.chain.run = run
        assert list(gather_output_fisher(runner)) == [(1, None), (0, None)]


def test_nothing_is_kept_afterwards(case: tuple[PreTrainedModel, list[Batch]]):
    model, batches = case
    runner = runner_of(model, batches)
    for _ in gather_output_fisher(runner):
        pass
    assert not any(runner.hidden_states.has(kind, step, b) for kind in ("outputs", "gradients") for step in range(3)
                   for b in runner.batches)  # fmt: skip
