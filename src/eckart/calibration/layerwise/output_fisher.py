"""The Fisher information of what each block puts out, gathered in one pass forwards and one backwards.

    G_b = sum_t g_t g_t^T

g_t is the gradient of the loss at what block b puts out for token t. With targets that are drawn from the model's own
predictions, an error e of a block's output moves the model's predictions by a KL of about `e^T G_b e / (2 T)`: G_b says
which errors matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eckart.calibration.layerwise.gather import ShowProgress
from eckart.calibration.layerwise.runner import LayerwiseRunner
from eckart.moments import Halving, real_tokens


def gather_output_fisher(
    runner: LayerwiseRunner, show: ShowProgress = lambda steps, _: steps
) -> Iterator[tuple[int, Tensor | None]]:
    """Run through all blocks and back.

    Args:
        runner: before its first step; its model returns a loss where gradients are enabled.
        show: shows progress over steps.

    Yields:
        Each step, the last one first, and the sum over the real tokens of the runner's batches, (n, n) in float64 where
        the model computes; None where the loss has no gradient there.

    Raises:
        LayerwiseError: the blocks do not form a chain.
    """
    tail, halving = runner.schedule.tail, Halving()

    def run(step: int, call: Callable[[Any], Any]) -> None:
        def run_part(part: Any) -> None:
            runner.split_batch(part)
            call(part)

        with runner.resident(step):
            for batch in list(runner.batches):
                halving.run(batch, run_part)

    for step in show(range(tail), "running forwards"):
        run(step, partial(runner.run_block, step))
    run(tail, partial(runner.run_tail, backward=True))
    for step in show(range(tail - 1, -1, -1), "which errors of blocks matter"):
        yield step, _sum_outer_products(runner, step)
        if step:
            run(step, partial(runner.run_block_backward, step))
        runner.drop_gradients(step + 1)
        runner.drop_outputs(step)
    runner.drop_all()


def _sum_outer_products(runner: LayerwiseRunner, step: int) -> Tensor | None:
    found: Tensor | None = None
    for batch in runner.batches:
        grad = runner.stream_gradient(step, batch)
        if grad is None:
            continue
        rows = real_tokens(grad, batch).to(torch.float32)
        product = (rows.T @ rows).double()
        found = product if found is None else found + product
    return found
