"""How much of what a training changed is best kept.

    w_a = w_0 + a (w_1 - w_0),    D(w_a) ~ D(w_0) + b a + c a^2

w_0 are the parameters before a training and w_1 those after it, D is the error on text that is not trained on. Along
this line a training's gain grows as a, and the harm that the noise of its steps does, as a^2: where the learning rate
was too large, the best place lies before the end. Wortsman et al. (2022, arXiv 2109.01903) mix the weights before and
after a training in the same way, with one a for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

FURTHEST = 1.5
"""The furthest place on the line that is tried: the parabola says little about places beyond it."""


def find_best_part(
    parameters: Sequence[nn.Parameter],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    errors: tuple[float, float],
    measure: Callable[[], float],
) -> tuple[float, float]:
    """Try half of the way, and the place where the parabola through the three errors is lowest.

    Args:
        parameters: are set; afterwards they are those of the last place that was tried.
        before: their values before the training.
        after: the values after it.
        errors: the errors with `before` and with `after`.
        measure: gives the error with the parameters as they are.

    Returns:
        The best part a of all four, and its error.
    """
    start, end = errors

    def error_at(part: float) -> float:
        set_part(parameters, before, after, part)
        return measure()

    found = {0.0: start, 1.0: end, 0.5: error_at(0.5)}
    lowest = _lowest_of_parabola(start, found[0.5], end)
    if lowest not in found:
        found[lowest] = error_at(lowest)
    finite = {part: error for part, error in found.items() if math.isfinite(error)} or {0.0: start}
    best = min(finite, key=lambda part: finite[part])
    return best, finite[best]


def set_part(
    parameters: Sequence[nn.Parameter], before: Sequence[Tensor], after: Sequence[Tensor], part: float
) -> None:
    """Put parameters at a place of the line."""
    with torch.no_grad():
        for parameter, old, new in zip(parameters, before, after, strict=True):
            parameter.copy_(torch.lerp(old, new, part) if part else old)  # the new one need not be finite


def _lowest_of_parabola(start: float, middle: float, end: float) -> float:
    """Where the parabola through the values at 0, 1/2 and 1 is lowest, between 0 and :data:`FURTHEST`."""
    bend = 2 * (start + end - 2 * middle)
    slope = end - start - bend
    if not bend > 0:  # it has no lowest place; or a value is not a number
        return 1.0 if end < start else 0.0
    return min(max(-slope / (2 * bend), 0.0), FURTHEST)
