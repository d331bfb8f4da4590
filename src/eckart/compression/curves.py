"""Curves of cost against predicted loss: of single sites, and of the units that are decided together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from eckart.allocation import DENSE, Choice, Curve, Option, RankMultiples, add, unite
from eckart.forms import Block, form_named

Losses = Mapping[Block | None, Tensor]
"""Shape of block -> (r + 1,) loss at rank 0 .. r; a form without blocks has one curve, under None."""

Cost = Callable[[Mapping[str, Choice]], float]
"""What some choices cost together: stored elements, or seconds."""

JOINT_MARGIN = 1.1
"""How much more a joint group is counted to lose than predicted: the prediction leaves out that the errors of its
members' outputs now vary together. Tried on a causal model, whose held-out loss was lower with 1.1 than with 1 at two
of three sizes and nearly equal at the third."""

Shapes = Mapping[str, tuple[int, int]]
"""Site -> (out, in)."""

Alternatives = Iterable[tuple[tuple[str, ...], Curve]]
"""Sites -> a curve of options in which they are decided together; two sets are disjoint, or one holds the other."""


def site_curve(
    name: str, shape: tuple[int, int], forms: Sequence[str], losses: Losses, multiples: RankMultiples, cost: Cost
) -> Curve:
    """All sizes that a site can have by itself, each with its predicted loss; dense is the last.

    Args:
        name: the site.
        shape: (out, in).
        forms: that it may take; all are made of the same factors.
        losses: at every rank of those factors.
        multiples: of ranks.
        cost: of a choice.
    """
    points: dict[float, tuple[float, Choice]] = {cost({name: Choice(DENSE)}): (0.0, Choice(DENSE))}
    for form in forms:
        kind = form_named(form)
        for block, curve in losses.items():
            for rank in multiples.ranks(shape, form, kind.max_rank(*shape, block)):
                choice, loss = Choice(form, rank, block), float(curve[rank])
                price = cost({name: choice})
                if price not in points or loss < points[price][0]:  # of two choices of one cost, the better
                    points[price] = loss, choice
    return _falling([(price, loss, Option.of_site(name, choice, loss)) for price, (loss, choice) in points.items()])


def joint_curve(
    members: Sequence[str],
    shapes: Shapes,
    form: str,
    losses: Tensor,
    largest: int,
    multiples: RankMultiples,
    cost: Cost,
) -> Curve:
    """All sizes that sites with one input factor can have, each with the predicted loss of all of them together.

    Args:
        members: the sites, the one that will hold the factor first.
        shapes: of all sites.
        form: that shares the factor.
        losses: (r + 1,) at rank 0, 1, ...
        largest: the largest rank that stores fewer numbers than the dense weights.
        multiples: of ranks.
        cost: of choices.
    """
    stacked = sum(shapes[name][0] for name in members), shapes[members[0]][1]
    points: list[tuple[float, float, Option]] = []
    for rank in multiples.ranks(stacked, form, largest):
        choices = joint_choices(members, form, rank)
        loss = float(losses[rank])
        points.append((cost(choices), JOINT_MARGIN * loss, Option(choices, {members[0]: loss})))
    return _falling(points)


def joint_choices(members: Sequence[str], form: str, rank: int) -> dict[str, Choice]:
    """The choices of sites that have one input factor, which the first one holds."""
    holder, *others = members
    return {holder: Choice(form, rank)} | {name: Choice(form, rank, basis=holder) for name in others}


def unit_curves(curves: Mapping[str, Curve], alternatives: Alternatives) -> dict[str, Curve]:
    """The curves of all units: sites with an alternative are decided together, the others alone.

    Args:
        curves: site -> its own curve.
        alternatives: curves of options for several sites.

    Returns:
        First site of a unit -> curve; every site is in one unit.
    """
    units: dict[tuple[str, ...], Curve] = {(name,): curve for name, curve in curves.items()}
    for members, curve in sorted(alternatives, key=lambda entry: len(entry[0])):
        inside = [unit for unit in units if set(unit) <= set(members)]
        together = tuple(name for unit in inside for name in unit)
        assert set(together) == set(members), "two alternatives overlap"
        units[together] = unite([curve, add([units.pop(unit) for unit in inside])])
    return {unit[0]: curve for unit, curve in units.items()}


def _falling(points: Iterable[tuple[float, float, Option]]) -> Curve:
    """The curve of all points of a known cost."""
    ordered = sorted((point for point in points if point[0] < math.inf), key=lambda point: point[:2])
    return Curve([point[2] for point in ordered], [point[0] for point in ordered], [point[1] for point in ordered])
