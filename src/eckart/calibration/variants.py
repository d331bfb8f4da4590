"""Run a model, and variants of it in which a few modules are others, on some batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from eckart.calibration.forward_context import forward_context
from eckart.calibration.layerwise import Branch, HiddenStateStore, all_blocks, run_branches, start_runner
from eckart.calibration.progress import show_steps
from eckart.calibration.resumed_pass import ResumedPass
from eckart.data import Batch
from eckart.data.inference import evaluating, progress
from eckart.model import WeightLoader, replaced

Run = Callable[[Batch], Any]
"""Runs the model on a batch."""

See = Callable[[int | None, Batch, Any], None]
"""`see(place, batch, output)`: of a variant by its place, after that of the model itself on this batch under None."""


def run_variants(
    model: nn.Module,
    variants: Mapping[int, Mapping[str, nn.Module]],
    batches: Sequence[Batch],
    run: Run,
    see: See,
    *,
    what: str,
) -> None:
    """Run a model that is in memory, batch by batch; each variant begins at the first block that differs.

    Args:
        model: it holds the modules of one variant after the other meanwhile.
        variants: place -> name of a module -> what takes its place.
        batches: to read.
        run: runs the model on a batch.
        see: is given every output.
        what: names the progress bar.
    """
    with evaluating(model):
        for batch in progress(batches, what=what):
            once = ResumedPass(model, partial(run, batch))
            see(None, batch, once.output)
            for place, modules in variants.items():
                with replaced(model, modules):
                    output = once.run_from(once.start_of(tuple(modules)))
                see(place, batch, output)


def run_variants_by_block(
    model: nn.Module,
    variants: Mapping[int, Mapping[str, nn.Module]],
    batches: Sequence[Batch],
    run: Run,
    see: See,
    *,
    weights: WeightLoader,
    hidden_states: HiddenStateStore,
    what: str,
) -> None:
    """As :func:`run_variants`, of a model larger than memory: all batches and variants pass through block after block.

    Args:
        model: as there.
        variants: as there.
        batches: as there.
        run: as there.
        see: as there.
        weights: of the model.
        hidden_states: keeps those of every variant between two blocks.
        what: names the progress bar.

    Raises:
        LayerwiseError: the model cannot be run block by block.
    """
    names = list(dict.fromkeys(name for modules in variants.values() for name in modules))
    context = forward_context(model, weights, all_blocks(model))
    trunk = start_runner(
        model, names, batches, batches[0].rows(0, 1), hidden_states, context=context, device=weights.device, name=what,
        run=run,
    )  # fmt: skip
    branches = {str(place): Branch.of(modules, model, trunk.schedule) for place, modules in variants.items()}
    run_branches(
        trunk,
        branches,
        lambda key, batch, output: see(None if key is None else int(key), batch, output),
        ready=weights.held,
        show=lambda steps: show_steps(steps, what),
    )
