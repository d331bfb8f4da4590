"""Curves scaled by what a cut does to the output of the whole model.

A curve predicts the loss of a cut from second derivatives at the original. Large cuts leave the range where that holds:
a gate and what it multiplies err together, and softmax saturates. So each unit of the plan (a weight, weights with one
input factor, a layer with fewer neurons) is cut alone, at the size that the plan gives it, and what that does to the
model's output is measured on a few rows of the calibration data. The curves of its weights are multiplied by

    measured distance / predicted loss,

and the plan is made again. The idea is that of LEMS (ICML 2026). Only the proportions between units matter, so that the
distance may be a KL or, of embeddings, 1 - cosine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.allocation import DENSE, Plan
from eckart.calibration.resumed_pass import ResumedPass
from eckart.compression.assemble import Assembly
from eckart.compression.context import CompressionContext
from eckart.compression.curves import Losses
from eckart.compression.factor_store import FactorStore
from eckart.compression.plan_builder import Solved
from eckart.data import Batch
from eckart.data.inference import evaluating, progress
from eckart.evaluation.output_distance import OutputDistance
from eckart.model import replace_module, shared_clone
from eckart.storage.store import MemoryStore

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
    """
    processes = context.workspace.processes
    units = units_of(plan)
    sums = torch.zeros(len(units) + 1, dtype=torch.float64)  # the last one counts rows
    with processes.failing_together():
        modules = _cut_modules(context, plan, factors)
        for batch in progress(_rows_to_read(context, len(units)), what="curves"):
            sums += _measure_on(batch, context, units, modules)
    if processes.size > 1:
        processes.all_reduce({"sums": sums})
    count = float(sums[-1]) / processes.size
    predicted = [sum(plan.predicted.get(name, 0.0) for name in unit) for unit in units]
    measured = (sums[:-1] / max(count, 1)).tolist()
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


def _cut_modules(context: CompressionContext, plan: Plan, factors: FactorStore) -> Mapping[str, Any]:
    """The modules of the plan by site, in the type of the original."""
    workspace = replace(context.workspace, store=MemoryStore())
    assembly = Assembly(context.model, context.sites.chosen, context.weights, workspace, None)
    compressed = assembly.put_forms(plan, factors)[0]
    return {site.name: compressed.get_submodule(site.name) for site in context.sites.chosen}


def _measure_on(
    batch: Batch, context: CompressionContext, units: Sequence[tuple[str, ...]], modules: Mapping[str, Any]
) -> Tensor:
    """Summed distance of every unit that this process measures, and the number of rows that are compared."""
    processes, model = context.workspace.processes, shared_clone(context.model)
    sums = torch.zeros(len(units) + 1, dtype=torch.float64)
    with evaluating(model):
        distance = OutputDistance.of(model, batch, context.pooling)
        once = ResumedPass(model, lambda: distance.run(model, batch))
        parts = distance.rows(model, once.output, batch)
        reference = distance.reference(parts)
        sums[-1] = sum(len(part) for part in parts)
        for place in range(processes.rank, len(units), processes.size):
            with _installed(model, {name: modules[name] for name in units[place]}):
                output = once.run_from(once.start_of(units[place]))
            sums[place] = distance.between(distance.rows(model, output, batch), reference).sum()
    return sums


@contextmanager
def _installed(model: PreTrainedModel, modules: Mapping[str, Any]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        replace_module(model, name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            replace_module(model, name, module)
