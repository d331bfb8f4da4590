"""Models of plans on trial, and what single cuts do to the output of the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from eckart.allocation import Plan
from eckart.calibration.layerwise import all_blocks
from eckart.calibration.variants import run_variants, run_variants_by_block
from eckart.compression.assemble import Assembly
from eckart.compression.context import CompressionContext
from eckart.compression.factor_store import FactorStore
from eckart.data import Batch
from eckart.data.inference import evaluating
from eckart.evaluation.output_distance import OutputDistance, Reference
from eckart.model import WeightLoader, shared_clone
from eckart.storage.store import MemoryStore

STAGE = "trial"
"""The stage of a run under which the modules of a plan on trial are stored."""


@contextmanager
def trial_model(
    context: CompressionContext, plan: Plan, factors: FactorStore, dtype: torch.dtype | None = None
) -> Iterator[PreTrainedModel]:
    """The model of a plan, apart from what the run stores; of a streamed run its modules lie in the journal meanwhile.

    Args:
        context: the original.
        plan: on trial.
        factors: of all sites.
        dtype: of the stored numbers; None for that of the original.

    Yields:
        The model.
    """
    workspace = context.workspace
    place = workspace if workspace.streaming else replace(workspace, store=MemoryStore())
    place.store.drop(STAGE)  # an interrupted run may have left another one
    assembly = Assembly(context.model, context.sites.chosen, context.weights, place, dtype, stage=STAGE)
    yield assembly.put_forms(plan, factors)[0]
    place.store.drop(STAGE)


def measure_variants(
    context: CompressionContext,
    variants: Mapping[int, Mapping[str, nn.Module]],
    count: int,
    batches: Sequence[Batch],
) -> list[float]:
    """Distance of the output of variants of the original from its own, averaged over rows.

    Args:
        context: the original.
        variants: those that this process measures: place -> name of a module -> what takes its place.
        count: how many variants all processes measure together.
        batches: that this process reads.

    Returns:
        A distance for each place; of one that several processes have measured, the mean over all their rows.

    Raises:
        LayerwiseError: the model is larger than memory and cannot be run block by block.
    """
    workspace = context.workspace
    model = shared_clone(context.model)
    weights = WeightLoader(model, workspace.compute)
    sums = torch.zeros(2, count, dtype=torch.float64)
    with workspace.processes.failing_together():
        if batches and variants:
            with evaluating(model), weights.streaming(all_blocks(model)):
                distance = OutputDistance.of(model, batches[0], context.pooling)
            found = _Distances(model, distance, sums)
            if workspace.streaming:
                states = workspace.hidden_state_cache()
                run_variants_by_block(
                    model, variants, batches, found.run, found.see, weights=weights, hidden_states=states, what=STAGE
                )
            else:
                run_variants(model, variants, batches, found.run, found.see, what=STAGE)
    if workspace.processes.size > 1:
        workspace.processes.all_reduce({"sums": sums})
    distances: list[float] = (sums[0] / sums[1].clamp(min=1)).tolist()
    return distances


class _Distances:
    """Sums, over rows, the distance of every variant's output from the model's.

    Args:
        model: that runs.
        distance: of outputs.
        sums: (2, variants) summed distance, and number of rows; added to.
    """

    def __init__(self, model: PreTrainedModel, distance: OutputDistance, sums: torch.Tensor) -> None:
        self.model = model
        self.distance = distance
        self.sums = sums
        self._reference: Reference = ()

    def run(self, batch: Batch) -> Any:
        return self.distance.run(self.model, batch)

    def see(self, place: int | None, batch: Batch, output: Any) -> None:
        parts = self.distance.rows(self.model, output, batch)
        if place is None:
            self._reference = self.distance.reference(parts)
        else:
            self.sums[0, place] += self.distance.between(parts, self._reference).sum().cpu()
            self.sums[1, place] += sum(len(part) for part in parts)
