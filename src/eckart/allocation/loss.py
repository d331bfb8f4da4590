"""Allocation by loss: one budget for all sites, spent where it lowers the predicted loss most.

Every site has a curve of (stored numbers, predicted loss), dense included. The Lagrangian optimum over
such curves lies on their lower convex hulls: taking the steepest next hull segment of all sites, again
and again, gives it for every budget that falls on a vertex; the rest of the budget is then spent
on the best single steps between vertices.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eckart.allocation.plan import Choice
from eckart.allocation.ranks import OverBudgetError, smallest_keep


@dataclass(frozen=True)
class Curve:
    """The options of one site, from the smallest to the largest, usually dense.

    Attributes:
        choices: the options.
        stored: elements that each option stores, strictly increasing.
        losses: predicted change of the loss of each option, in the same unit for every site.
    """

    choices: Sequence[Choice]
    stored: Sequence[int]
    losses: Sequence[float]


def lower_hull(stored: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Indices of the vertices of the lower convex hull of the points, left to right, falling only."""
    hull: list[int] = []
    for i in range(len(stored)):
        if hull and losses[i] >= losses[hull[-1]]:
            continue  # larger and no better
        while len(hull) >= 2 and _slope(stored, losses, hull[-2], i) <= _slope(stored, losses, hull[-2], hull[-1]):
            hull.pop()
        hull.append(i)
    return hull


def allocate(curves: Mapping[str, Curve], budget: int) -> dict[str, Choice]:
    """Choose one option a site so that the summed loss is least and the budget is not exceeded.

    Args:
        curves: site -> curve.
        budget: stored elements over all sites.

    Returns:
        Site -> choice. No single step to a larger option of lower loss fits any more.

    Raises:
        OverBudgetError: if the smallest options together exceed the budget, naming the smallest keep.
    """
    hulls = {name: lower_hull(curve.stored, curve.losses) for name, curve in curves.items()}
    position = {name: hull[0] for name, hull in hulls.items()}
    spent = sum(curves[name].stored[i] for name, i in position.items())
    if spent > budget:
        dense = sum(curve.stored[-1] for curve in curves.values())
        raise OverBudgetError(
            f"a budget of {budget} elements is below the {spent} that the smallest options need; "
            f"the smallest keep of these sites is {smallest_keep(spent, dense):.4f}. "
            "Raise --keep or name more --targets.",
            spent,
        )
    queue: list[tuple[float, str, int]] = []

    def push(name: str, step: int) -> None:
        hull = hulls[name]
        if step + 1 < len(hull):
            curve = curves[name]
            slope = _slope(curve.stored, curve.losses, hull[step], hull[step + 1])
            heapq.heappush(queue, (slope, name, step))  # most negative first; ties by name

    for name in hulls:
        push(name, 0)
    while queue:
        _, name, step = heapq.heappop(queue)
        target = hulls[name][step + 1]
        cost = curves[name].stored[target] - curves[name].stored[position[name]]
        if spent + cost > budget:
            continue  # this site stops here; a cheaper segment of another may still fit
        position[name] = target
        spent += cost
        push(name, step + 1)
    _fill(curves, position, budget - spent)
    return {name: curves[name].choices[i] for name, i in position.items()}


def _fill(curves: Mapping[str, Curve], position: dict[str, int], left: int) -> None:
    """Spend the rest of the budget on the best single steps, on the hull or not, until none fits."""
    while left > 0:
        best: tuple[float, str, int] | None = None
        for name, curve in curves.items():
            here = position[name]
            for there in range(here + 1, len(curve.stored)):
                if curve.stored[there] - curve.stored[here] > left:
                    break
                if curve.losses[there] < curve.losses[here]:
                    candidate = (_slope(curve.stored, curve.losses, here, there), name, there)
                    if best is None or candidate < best:
                        best = candidate
        if best is None:
            return
        _, name, there = best
        left -= curves[name].stored[there] - curves[name].stored[position[name]]
        position[name] = there


def _slope(stored: Sequence[int], losses: Sequence[float], i: int, j: int) -> float:
    return (losses[j] - losses[i]) / (stored[j] - stored[i])
