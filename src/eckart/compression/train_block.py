"""Train the parameters of one block until its outputs are nearest to what they should be.

    min  sum_t || f(x~_t) - f_0(x_t) ||^2

over all parameters of the block f: f_0 is the original block, x_t what it reads in the original, and x~_t what the
blocks before it give it, which are smaller already. This is the block refinement of AA-SVD (arXiv 2604.02119), with its
AdamW, warm-up and cosine. What had to be tuned there follows from the block: each parameter's learning rate is a part
of its own root mean square, in proportion to the block's relative error, and the epoch with the least error on text
that is not trained on is kept, which may be the one before the first.

The last block has nothing after it that could mend its errors: there the distance of the model's own outputs is made
small instead. So it is where all blocks are trained together: for this function they are one block. The caller's error
says what is made small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from eckart.compression.best_part import find_best_part, set_part
from eckart.distributed import Processes

T = TypeVar("T")

SquaredError = Callable[[T], tuple[Tensor, Tensor]]
"""Of a batch: the sum of squared errors, and that of the squares of what should come out; or of distances, and 1."""


@dataclass(frozen=True)
class BlockTraining:
    """How a block is trained.

    Attributes:
        epochs: passes over the text.
        rate: largest learning rate, as a part of the root mean square of each parameter. It is multiplied by the root
            of the block's relative error, so that it is a part of what is to be mended, or by a number of the caller's.
        largest: and no more than this.
        warmup: part of the steps in which the rate rises.
        last: part of the largest rate that it falls to.
        least: root mean square that each parameter is taken to have at least: zeros must be able to move.
        betas: of AdamW.
        part: whether to look for a better place on the line from the parameters before to those after.
        seed: of the order of the batches.
    """

    epochs: int = 9
    rate: float = 0.06
    largest: float = 0.01
    warmup: float = 0.1
    last: float = 0.1
    least: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    part: bool = False
    seed: int = 0


@dataclass(frozen=True)
class BlockFit:
    """What a training brought.

    The error is that of a block's output on text that is not trained on: squared, relative to the squares of what it
    should be. Where outputs of the model are compared, it is their mean distance.

    Attributes:
        before: error before the training.
        after: error of what was kept.
        epoch: the one that was kept, from 1; 0 for the block as it was.
        part: of the change up to then that was kept.
    """

    before: float
    after: float
    epoch: int
    part: float = 1.0


def train_block(
    parameters: Sequence[nn.Parameter],
    steps: Sequence[Sequence[T]],
    held: Sequence[T],
    error: SquaredError[T],
    training: BlockTraining,
    processes: Processes,
    scale: float | None = None,
    show: Callable[[Sequence[int]], Iterable[int]] = lambda order: order,
) -> BlockFit:
    """Train parameters in place; afterwards they are those of the best epoch, or of the best part of the way to it.

    Args:
        parameters: of the block, in float32.
        steps: the batches of every step of an epoch. Each process has its own rows of each step, or none: the gradient
            is that of all rows.
        held: batches that are not trained on.
        error: runs the block on a batch.
        training: how.
        processes: share the rows.
        scale: what `training.rate` is multiplied by; without it the root of the block's relative error.
        show: shows progress over the steps of an epoch.
    """
    best, power = measure_error(held, error, processes)
    if not 0 < best < math.inf:  # nothing to mend, or no number to tell by what mends it
        return BlockFit(best, best, 0, 0.0)
    if scale is None:
        scale = math.sqrt(best / power) if power else 1.0
    rate = min(training.rate * scale, training.largest)
    rates = [rate * typical_size(p, training.least) for p in parameters]
    fused = parameters[0].device.type in ("cpu", "cuda")
    groups = [{"params": [p]} for p in parameters]
    optimizer = torch.optim.AdamW(groups, betas=training.betas, weight_decay=0.0, fused=fused)
    order = torch.Generator().manual_seed(training.seed)
    before, epoch, kept = best, 0, _values(parameters)
    start, now = kept if training.part else None, best
    for number in range(training.epochs):
        for place, i in enumerate(show(torch.randperm(len(steps), generator=order).tolist())):
            for batch in steps[i]:
                (error(batch)[0] / max(power, torch.finfo(torch.float32).tiny)).backward()
            _add_gradients(parameters, processes)
            height = part_of_rate(number * len(steps) + place, training.epochs * len(steps), training)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * height
            optimizer.step()
            if fused:  # leaves no mark of its own: forms that keep what follows from their weights would not notice
                torch.autograd.graph.increment_version(parameters)
            optimizer.zero_grad()
        now, _ = measure_error(held, error, processes)
        if now < best:  # of numbers that are not finite neither
            best, epoch, kept = now, number + 1, _values(parameters)
        if not math.isfinite(now):
            break
    if start is not None:
        end, error_of_end = (kept, best) if epoch else (_values(parameters), now)
        part, best = find_best_part(
            parameters, start, end, (before, error_of_end), lambda: measure_error(held, error, processes)[0]
        )
        epoch = (epoch or training.epochs) if part else 0
        set_part(parameters, start, end, part)
    else:
        part = float(epoch > 0)
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
    return BlockFit(before / power, best / power, epoch, part) if power else BlockFit(0.0, 0.0, epoch)


def _values(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def typical_size(parameter: Tensor, least: float) -> float:
    """Root mean square of a parameter, but so much at least."""
    return max(float(parameter.detach().square().mean().sqrt()), least)


def measure_error(held: Sequence[T], error: SquaredError[T], processes: Processes) -> tuple[float, float]:
    """Sum of errors and of what they are relative to, over all processes, without gradients."""
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in held:
            sums += torch.stack([value.cpu() for value in error(batch)]).double()
    processes.all_reduce({"sums": sums})
    wrong, power = sums.tolist()
    return wrong, power


def _add_gradients(parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    """Let every process have the gradients of all."""
    if processes.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    processes.all_reduce({"gradients": flat})
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def part_of_rate(step: int, steps: int, training: BlockTraining) -> float:
    """The learning rate of a step, from 0, as a part of the largest: a line up, then half a cosine down."""
    rising = max(1, round(training.warmup * steps))
    if step < rising:
        return (step + 1) / rising
    way = (step - rising) / max(1, steps - rising)
    return training.last + (1 - training.last) * (1 + math.cos(math.pi * way)) / 2
