"""How large a random change of all parameters does as much harm as a compression did.

    e  such that  D(p_0, p(. | w + e rms(w) n)) - D(p_0, p(. | w)) = D(p_0, p(. | w)),   n ~ N(0, 1)

D is the distance of the smaller model p from its original p_0, w its parameters, rms(w) the root mean square of each of
them. For small e the left side is s e^2, where s says how sensitive a model is: on a model of 6.5 M parameters s is 12,
on one of 135 M it is 200. A learning rate as a part of each parameter's size must know that, and the harm that is to be
mended; e says both in one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from eckart.compression.train_block import SquaredError, T, measure_error, typical_size
from eckart.distributed import Processes

GUESS = 0.03
"""The size that is tried first."""

TRIALS = 4
"""Sizes that are tried at most."""

NEAR = 2.0
"""The search stops when the next size is less than this factor away from the one that was tried: D grows about as the
square of the size, so the next one is exact enough."""


def find_equal_noise(
    parameters: Sequence[nn.Parameter],
    held: Sequence[T],
    error: SquaredError[T],
    least: float,
    processes: Processes,
    seed: int = 0,
) -> float:
    """Find the size by trials; the parameters are the same afterwards.

    Args:
        parameters: of the smaller model.
        held: batches to measure on.
        error: sum of the distances of a batch.
        least: root mean square that each parameter is taken to have at least.
        processes: share the batches; all change the parameters alike.
        seed: of the noise.

    Returns:
        e; 0 where there is no distance, or none that is a number.
    """
    before, _ = measure_error(held, error, processes)
    if not 0 < before < math.inf:
        return 0.0
    kept = [p.detach().clone() for p in parameters]
    size = GUESS
    try:
        for _ in range(TRIALS):
            _add_noise(parameters, kept, size, least, seed)
            harm = measure_error(held, error, processes)[0] - before
            step = _clamped(math.sqrt(max(harm, 0.0) / before)) if math.isfinite(harm) else 10.0
            size /= step
            if 1 / NEAR <= step <= NEAR:
                break
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
    return size


def _add_noise(
    parameters: Sequence[nn.Parameter], kept: Sequence[torch.Tensor], size: float, least: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every device
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            noise = torch.randn(value.shape, generator=generator).to(value.device)
            parameter.copy_(value + size * typical_size(value, least) * noise)


def _clamped(step: float) -> float:
    return min(max(step, 0.1), 10.0)
