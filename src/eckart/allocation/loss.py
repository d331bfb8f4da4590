"""Allocation by loss: one budget for all units, spent where it lowers the predicted loss most.

A unit is a set of sites that are decided together: a single weight; the weights that read one input, which may have one
input factor or be factored apart; a feed-forward layer, which may lose neurons or have its weights factored. Every unit
has a curve of (cost, predicted loss) over its options, dense included. The Lagrangian optimum over such curves lies on
their lower convex hulls: taking the steepest next hull segment of all units, again and again, gives it for every budget
that falls on a vertex; the rest of the budget is then spent on the best single steps between vertices.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from eckart.allocation.plan import Choice
from eckart.allocation.ranks import OverBudgetError, smallest_keep


@dataclass(frozen=True)
class Option:
    """One way to store the sites of a unit.

    Attributes:
        choices: site -> how it is stored.
        losses: site -> predicted change of the loss; of sites with a common factor or neurons, the sum at one of them.
    """

    choices: Mapping[str, Choice]
    losses: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_site(cls, name: str, choice: Choice, loss: float) -> Option:
        """The option of a unit of one site."""
        return cls({name: choice}, {name: loss})


@dataclass(frozen=True)
class Curve:
    """The options of one unit, from the cheapest to the most expensive, usually dense.

    Attributes:
        options: what may be chosen.
        costs: of each option, strictly increasing: stored elements, or seconds.
        losses: predicted change of the loss of each option, in the same unit for every curve.
    """

    options: Sequence[Option]
    costs: Sequence[float]
    losses: Sequence[float]


def lower_hull(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices of the vertices of the lower convex hull of the points, left to right, falling only."""
    hull: list[int] = []
    for i in range(len(costs)):
        if hull and losses[i] >= losses[hull[-1]]:
            continue  # more expensive and no better
        while len(hull) >= 2 and _slope(costs, losses, hull[-2], i) <= _slope(costs, losses, hull[-2], hull[-1]):
            hull.pop()
        hull.append(i)
    return hull


def unite(curves: Sequence[Curve]) -> Curve:
    """The curve of a unit that may take any option of several curves over the same sites.

    An option that costs as much as another and loses more is left out.
    """
    points = [point for curve in curves for point in zip(curve.costs, curve.losses, curve.options, strict=True)]
    points.sort(key=lambda point: point[:2])
    kept: list[tuple[float, float, Option]] = []
    for point in points:
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return _curve(kept)


def add(curves: Sequence[Curve]) -> Curve:
    """The curve of several independent units taken as one: the vertices of the sum of their lower hulls."""
    if len(curves) == 1:
        return curves[0]
    hulls = [lower_hull(curve.costs, curve.losses) for curve in curves]
    position = [hull[0] for hull in hulls]
    steps = [
        (_slope(curve.costs, curve.losses, i, j), number, j)
        for number, (curve, hull) in enumerate(zip(curves, hulls, strict=True))
        for i, j in itertools.pairwise(hull)
    ]
    points = [_sum_at(curves, position)]
    for _, number, there in sorted(steps):  # on a hull slopes rise, so that the steps of one curve stay in order
        position[number] = there
        points.append(_sum_at(curves, position))
    return _curve(points)


def allocate(curves: Mapping[str, Curve], budget: float) -> dict[str, Option]:
    """Choose one option a unit so that the summed loss is least and the budget is not exceeded.

    Args:
        curves: unit -> curve.
        budget: of all units together, in the unit of the curves' costs.

    Returns:
        Unit -> option. No single step to a more expensive option of lower loss fits any more.

    Raises:
        OverBudgetError: if the cheapest options together exceed the budget, naming the smallest keep.
    """
    hulls = {name: lower_hull(curve.costs, curve.losses) for name, curve in curves.items()}
    position = {name: hull[0] for name, hull in hulls.items()}
    spent = sum(curves[name].costs[i] for name, i in position.items())
    if spent > budget:
        dense = sum(curve.costs[-1] for curve in curves.values())
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
            slope = _slope(curve.costs, curve.losses, hull[step], hull[step + 1])
            heapq.heappush(queue, (slope, name, step))  # most negative first; ties by name

    for name in hulls:
        push(name, 0)
    while queue:
        _, name, step = heapq.heappop(queue)
        target = hulls[name][step + 1]
        cost = curves[name].costs[target] - curves[name].costs[position[name]]
        if spent + cost > budget:
            continue  # this unit stops here; a cheaper segment of another may still fit
        position[name] = target
        spent += cost
        push(name, step + 1)
    _fill(curves, position, budget - spent)
    return {name: curves[name].options[i] for name, i in position.items()}


def _fill(curves: Mapping[str, Curve], position: dict[str, int], left: float) -> None:
    """Spend the rest of the budget on the best single steps, on the hull or not, until none fits."""
    while left > 0:
        best: tuple[float, str, int] | None = None
        for name, curve in curves.items():
            here = position[name]
            for there in range(here + 1, len(curve.costs)):
                if curve.costs[there] - curve.costs[here] > left:
                    break
                if curve.losses[there] < curve.losses[here]:
                    candidate = (_slope(curve.costs, curve.losses, here, there), name, there)
                    if best is None or candidate < best:
                        best = candidate
        if best is None:
            return
        _, name, there = best
        left -= curves[name].costs[there] - curves[name].costs[position[name]]
        position[name] = there


def _sum_at(curves: Sequence[Curve], position: Sequence[int]) -> tuple[float, float, Option]:
    """Cost, loss and choices of one option of each curve."""
    options = [curve.options[i] for curve, i in zip(curves, position, strict=True)]
    return (
        sum(curve.costs[i] for curve, i in zip(curves, position, strict=True)),
        sum(curve.losses[i] for curve, i in zip(curves, position, strict=True)),
        Option(
            {name: choice for option in options for name, choice in option.choices.items()},
            {name: loss for option in options for name, loss in option.losses.items()},
        ),
    )


def _curve(points: Iterable[tuple[float, float, Option]]) -> Curve:
    costs, losses, options = zip(*points, strict=True)
    return Curve(options, costs, losses)


def _slope(costs: Sequence[float], losses: Sequence[float], i: int, j: int) -> float:
    return (losses[j] - losses[i]) / (costs[j] - costs[i])
