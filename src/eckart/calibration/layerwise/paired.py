"""Two models side by side on their way through the same text: the original, and the one that is made like it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from eckart.calibration.layerwise import HiddenStateStore, LayerwiseRunner, trace_blocks
from eckart.data import Batch
from eckart.data.inference import forward


def start_runner(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    first: Batch,
    store: HiddenStateStore,
    *,
    held: Callable[[str | None], Any],
    device: torch.device,
    name: str,
) -> LayerwiseRunner:
    """A model before its first step.

    Args:
        model: the model.
        names: sites that will be looked at.
        batches: what it reads.
        first: one example, on which it is taken apart.
        store: where hidden states wait.
        held: as for :class:`eckart.calibration.layerwise.LayerwiseRunner`.
        device: where it computes.
        name: keeps walks apart that share the store.

    Raises:
        UnwalkableError: it cannot be walked block by block.
    """

    def run(batch: Batch) -> Any:
        return forward(model, batch.inputs)

    with held(None):
        order, structures = trace_blocks(model, names, run, first, store, held=held, device=device)
    walk = LayerwiseRunner(model, order, run, batches, store, held=held, device=device, name=name)
    walk.structures = structures
    return walk


def advance(walks: Iterable[LayerwiseRunner], step: int) -> None:
    """Take every walk through a step with all its batches, and forget what no later step reads."""
    for walk in walks:
        with walk.at(step):
            for batch in walk.batches:
                walk.forward(step, batch)
        walk.forget(step - 1)
