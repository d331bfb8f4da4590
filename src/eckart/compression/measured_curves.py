"""Curves scaled by what a cut does to the output of the whole model.

A curve predicts the loss of a cut from second derivatives at the original. Large cuts leave the range where that holds:
a gate and what it multiplies err together, and softmax saturates. So each unit of the plan (a weight, weights with one
input factor, a layer with fewer neurons) is cut alone, at the size that the plan gives it, and what that does to the
model's output is measured on a few rows of the calibration data. The curves of its weights are multiplied by

    measured distance / predicted loss,

and the plan is made again. The idea is that of LEMS (ICML 2026), whose depth factor, chosen by trials of whole plans on
the calibration data, made held-out text worse here and was left out. Only the proportions between units matter, so that
the distance may be a KL or, of embeddings, 1 - cosine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from eckart.allocation import DENSE, Plan
from eckart.compression.context import CompressionContext
from eckart.compression.curves import Losses
from eckart.compression.factor_store import FactorStore
from eckart.compression.plan_builder import Solved
from eckart.compression.trials import measure_variants, trial_model
from eckart.data import Batch

LARGEST_RATIO = 16.0
"""Ratios are kept between this and its inverse: more is a matter of few rows."""

MOST_ROWS = 64
"""Rows that are read at most."""

COST = 0.5
"""What the measuring may take, as a part of what gathering the statistics takes; it takes one row at least."""

BACKWARD = 3.0
"""Forward passes that a forward and backward pass takes the time of."""


@dataclass(frozen=True)
class UnitError:
    """What a unit of the plan does to the model's output when it alone is cut.

    Attributes:
        members: its sites, the one that holds what they share first.
        predicted: loss, of its curve.
        measured: distance of the outputs.
    """

    members: tuple[str, ...]
    predicted: float
    measured: float

    def to_json(self) -> dict[str, Any]:
        """As it stands in a report."""
        return {"sites": list(self.members), "predicted": self.predicted, "measured": self.measured}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> UnitError:
        """The reverse of :meth:`to_json`."""
        return cls(tuple(entry["sites"]), entry["predicted"], entry["measured"])


def units_of(plan: Plan) -> list[tuple[str, ...]]:
    """The sites that are not dense, those that share something together, in the order of the model."""
    units: dict[str, list[str]] = {}
    for name, choice in plan.choices.items():
        if choice.form != DENSE and choice.basis is None:
            units[name] = [name]
    for name, choice in plan.choices.items():
        if choice.basis is not None:
            units.setdefault(choice.basis, []).append(name)
    return [tuple(members) for members in units.values()]


def measure_units(context: CompressionContext, plan: Plan, factors: FactorStore) -> list[UnitError]:
    """Cut each unit of a plan alone, at the planned size, and measure.

    The units are divided among the processes, which all read the same rows.

    Args:
        context: the original and its data.
        plan: with predicted losses.
        factors: of all sites.

    Raises:
        LayerwiseError: the model is larger than memory and cannot be run block by block.
    """
    processes, units = context.workspace.processes, units_of(plan)
    mine = range(processes.rank, len(units), processes.size)
    with trial_model(context, plan, factors) as smaller:
        variants = {place: {name: smaller.get_submodule(name) for name in units[place]} for place in mine}
        measured = measure_variants(context, variants, len(units), _rows_to_read(context, len(units)))
    predicted = [sum(plan.predicted.get(name, 0.0) for name in unit) for unit in units]
    return [UnitError(*entry) for entry in zip(units, predicted, measured, strict=True)]


def ratios_of(errors: Sequence[UnitError]) -> dict[str, float]:
    """Site -> measured / predicted, divided by the geometric mean of all; 1 where either is not a positive number."""
    known = {
        e.members: math.log(e.measured / e.predicted)
        for e in errors
        if 0 < e.predicted < math.inf and 0 < e.measured < math.inf
    }
    if not known:
        return {}
    middle = sum(known.values()) / len(known)
    bound = math.log(LARGEST_RATIO)
    return {name: math.exp(min(max(log - middle, -bound), bound)) for members, log in known.items() for name in members}


def scale_curves(solved: Solved, ratios: Mapping[str, float]) -> Solved:
    """Multiply the curves of sites by their ratios, those of groups and layers by the geometric mean of theirs."""

    def mean(names: Sequence[str]) -> float:
        return math.exp(sum(math.log(ratios.get(name, 1.0)) for name in names) / len(names))

    def scaled(curve: Tensor | None, names: Sequence[str]) -> Tensor | None:
        return None if curve is None else curve * mean(names)

    def all_scaled(curves: Losses | None, name: str) -> Losses | None:
        return None if curves is None else {block: curve * mean([name]) for block, curve in curves.items()}

    return replace(
        solved,
        sites={name: all_scaled(curves, name) for name, curves in solved.sites.items()},
        joint={group: scaled(curve, group) for group, curve in solved.joint.items()},
        sliced={layer: scaled(curve, layer.names) for layer, curve in solved.sliced.items()},
    )


# -- inside ------------------------------------------------------------------------------------------------------------


def _rows_to_read(context: CompressionContext, units: int) -> list[Batch]:
    """Rows of the calibration data, evenly spaced, so many that measuring costs a part of the statistics' time."""
    assert context.data is not None
    batches = context.data.batches
    examples = sum(len(batch) for batch in batches)
    passes = 1 + units / 2  # one of the original, and the later half of the model for each unit
    wanted = min(max(1, int(COST * BACKWARD * examples / passes)), MOST_ROWS, examples)
    size = len(batches[0])
    step = len(batches) / max(1, -(-wanted // size))
    chosen: list[Batch] = []
    for place in range(-(-wanted // size)):
        batch = batches[int(step * (place + 0.5))]
        chosen.append(batch.rows(0, min(len(batch), wanted - sum(len(b) for b in chosen))))
    return [batch for batch in chosen if len(batch)]
