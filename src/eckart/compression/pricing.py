"""What choices cost, and how much may be spent: stored elements, or seconds that are measured on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eckart.allocation import DENSE, Choice
from eckart.compression.budget import Budget
from eckart.compression.curves import Cost, Shapes
from eckart.forms import form_named
from eckart.speed.profile import Profile


@dataclass(frozen=True)
class Pricing:
    """The price of every choice, and the budget of all sites together.

    Attributes:
        cost: what choices for some sites cost together; infinite where it is not known.
        budget: what all sites may cost, those that stay dense included.
        seconds: what choices take, where seconds are what is paid; None for stored elements alone.
    """

    cost: Cost
    budget: float
    seconds: Cost | None = None

    def rest(self, dense: Sequence[str]) -> float:
        """The budget that is left beside sites that stay dense."""
        return self.budget - sum(self.cost({name: Choice(DENSE)}) for name in dense)


def price_elements(shapes: Shapes, budget: Budget) -> Pricing:
    """Stored elements, within the budget of the recipe."""
    return Pricing(count_elements(shapes), budget.elements)


def price_elements_and_seconds(shapes: Shapes, budget: Budget, profile: Profile) -> Pricing:
    """A share of the stored elements and the same share of the seconds, whichever is more of a choice.

    Seconds are counted in elements, so many as the dense weights have for one second: neither all elements nor all
    seconds are then more than the budget's share of the dense ones. A choice that is slower than the dense weight costs
    more than it, and is never taken.
    """
    elements, seconds = count_elements(shapes), count_seconds(shapes, profile)
    dense = {name: Choice(DENSE) for name in shapes}
    rate = elements(dense) / sum(seconds({name: choice}) for name, choice in dense.items())
    return Pricing(lambda choices: max(elements(choices), rate * seconds(choices)), budget.elements, seconds)


def price_seconds(shapes: Shapes, budget: float, profile: Profile) -> Pricing:
    """Seconds, within a budget of seconds for all sites."""
    seconds = count_seconds(shapes, profile)
    return Pricing(seconds, budget, seconds)


def count_elements(shapes: Shapes) -> Cost:
    """Elements that choices store."""
    return lambda choices: sum(choice.stored(*shapes[name]) for name, choice in choices.items())


def count_seconds(shapes: Shapes, profile: Profile) -> Cost:
    """Seconds that the weights of some choices take for the tokens of a profile; infinite where it does not say."""

    def seconds(choices: Mapping[str, Choice]) -> float:
        total = 0.0
        for form, width, heights, rank in _layers(choices, shapes):
            if not profile.covers(form, width, heights, rank):
                return math.inf
            total += profile.seconds(form, width, heights, rank)
        return total

    return seconds


def _layers(choices: Mapping[str, Choice], shapes: Shapes) -> list[tuple[str, int, tuple[int, ...], int]]:
    """Form, width, heights and rank of what is computed together, as a profile names it.

    Each site by itself, a group with one input factor, or a layer of neurons: what makes them, then what reads them.
    """
    groups: dict[str, list[str]] = {}
    for name, choice in choices.items():
        together = choice.form != DENSE and form_named(choice.form).shared_by in ("input", "neurons")
        groups.setdefault((choice.basis or name) if together else name, []).append(name)
    found: list[tuple[str, int, tuple[int, ...], int]] = []
    for holder, members in groups.items():
        choice = choices[holder]
        if choice.form != DENSE and form_named(choice.form).shared_by == "neurons":
            writers = [name for name in members if name != holder]
            found.append((choice.form, *layer_sizes([shapes[name] for name in writers], shapes[holder]), choice.rank))
        else:
            found.append((choice.form, shapes[holder][1], tuple(shapes[name][0] for name in members), choice.rank))
    return found


def layer_sizes(writers: Sequence[tuple[int, int]], reader: tuple[int, int]) -> tuple[int, tuple[int, ...]]:
    """Width and heights of a feed-forward layer: neurons of each projection up, then outputs of the one down.

    A weight that makes several numbers a neuron, a gate with the projection up, counts as so many.
    """
    outputs, neurons = reader
    return writers[0][1], (*(neurons for rows, _ in writers for _ in range(rows // neurons)), outputs)
