"""How much work a run puts into quality beyond statistics and factors: which stages follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from eckart.methods import Method

Effort = Literal["fast", "default", "best"]
EFFORTS: tuple[str, ...] = get_args(Effort)


def with_effort(method: Method, effort: Effort) -> Method:
    """The method with the stages of an effort; each can still be asked for, or left out, by its own option.

    Args:
        method: with the stages that it names itself, which are those of "default".
        effort: "fast": no stage but statistics and factors. "best": a refit in closed form as far as its metric
            allows, then all blocks trained together or, where that cannot be, one after another. Curves scaled by what
            is measured are not among them: they make the loss of the factors smaller, and what is left of that after
            both was as often a loss as a gain.
    """
    if effort == "fast":
        return replace(method, refit=False, calibrated_curves=False, refined=False, distilled=False)
    if effort == "best":
        return replace(method, refit=True, refined=True, distilled=True)
    return method
