"""Run a model over calibration data and gather what the metrics ask for, whole or one window of sites at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.calibration.coverage import why_useless
from eckart.calibration.forward_context import ready
from eckart.calibration.layerwise import (
    Groups,
    HiddenStateStore,
    LayerwiseError,
    LayerwiseRunner,
    StatisticsWindow,
    all_blocks,
    gather_layerwise,
    not_done,
    split_by_block,
    trace_blocks,
)
from eckart.calibration.losses import labeled_step, plain_step, sampled_step
from eckart.calibration.progress import show_steps
from eckart.data import Batch, CalibrationData, Pooling
from eckart.data.inference import forward, progress
from eckart.distributed import Processes
from eckart.errors import EckartError, ModelError
from eckart.model import WeightLoader
from eckart.moments import Moments, Step, common_calls, gather, is_out_of_memory, needs_backward, shared_inputs

logger = logging.getLogger(__name__)

WHOLE = "whole"
"""Name of the window of all sites."""


@dataclass
class Calibration:
    """What the data will say about the sites: windows of statistics, gathered when they are asked for.

    Attributes:
        groups: leader -> members: sites that share an input, in order of the forward pass.
        curvature: "sampled", "labels" or "none".
        common: sites that are also called on what all examples of a batch share, such as relative positions.
        backward_failed: why no backward pass ran, or None.
        notes: fallbacks taken.
        how: the way the windows are gathered, in words.
    """

    groups: Groups
    curvature: str
    common: frozenset[str] = frozenset()
    backward_failed: str | None = None
    notes: list[str] = field(default_factory=list)
    how: str = "at once"
    gathered: Callable[[Collection[str]], Iterator[StatisticsWindow]] = field(default=lambda _: iter(()), repr=False)

    def windows(self, done: Collection[str] = ()) -> Iterator[StatisticsWindow]:
        """Gather, window by window; what was kept for a window is dropped when the next one is asked for.

        Args:
            done: names of windows that are not needed any more.
        """
        return self.gathered(done)

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """The statistics of all sites that data reached, at the same time."""
        found: dict[str, Moments] = {}
        for window in self.windows():
            found |= {n: m for n, m in window.moments.items() if why_useless(m) is None}
        return found


def calibrate(
    model: PreTrainedModel,
    names: Sequence[str],
    data: CalibrationData,
    *,
    needs: frozenset[str],
    curvature: str = "auto",
    seed: int = 0,
    pooling: Pooling | None = None,
    may_fall_back: bool = False,
    weights: WeightLoader | None = None,
    waiting: HiddenStateStore | None = None,
    at_once: int = 1,
    processes: Processes | None = None,
) -> Calibration:
    """Make ready to gather moments of the named modules.

    Args:
        model: the model.
        names: sites.
        data: batches.
        needs: statistics the metric reads, see :class:`eckart.methods.Method`.
        curvature: "auto" (own labels where the data has them, else draws), "sampled" or "labels".
        seed: of the draws.
        pooling: how sentence embeddings are made, for embedding models.
        may_fall_back: gather input Grams alone, with a note, where no backward pass runs.
        weights: brings the model's weights to where they compute; None where they are there.
        waiting: where hidden states wait between blocks; given one, the model is walked block by block.
        at_once: how many blocks make a window where a model cannot be walked.
        processes: each gathers over its share of the batches.

    Returns:
        What is known before the long work, and the way to the statistics.

    Raises:
        NumericalError: on values that are not finite, naming site and batch.
        ModelError: if a backward pass is needed, cannot run, and nothing may replace it.
    """
    weights = weights or WeightLoader(model, None)
    backward = needs_backward(needs)
    labeled = backward and (curvature == "labels" or (curvature == "auto" and data.has_labels))
    step = labeled_step(model) if labeled else sampled_step(model, seed, pooling) if backward else plain_step(model)
    work = _Work(model, weights, all_blocks(model))
    first = data.batches[0].rows(0, 1)
    with work.running(None):
        apart = work.blocks if waiting is not None else ()
        groups = shared_inputs(model, names, lambda: forward(model, first.inputs), apart)
        called = {name for members in groups.values() for name in members}
        groups |= {name: (name,) for name in names if name not in called}  # other examples may: an expert, say
        common = _common_calls(model, names, first)
    notes: list[str] = []
    walk: LayerwiseRunner | None = None
    runs = (processes or Processes()).own_part(_single(data.batches) if common else data.batches)
    if waiting is not None:
        try:
            walk = work.walk(names, runs, first, waiting, backward)
            gather_layerwise(walk, groups, needs=needs, common=common)
        except LayerwiseError as error:
            walk = None
            _note_unwalkable(model, error, notes)
    failed: str | None = None
    if backward:
        failed = work.why_no_backward(groups, first, step, needs, walk)
    if failed is not None:
        if not may_fall_back:
            raise ModelError(
                f"{type(model).__name__}: no backward pass runs through it ({failed}). "
                "Use a method that needs none: --method drone --allocation uniform."
            )
        backward, labeled, step, needs = False, False, plain_step(model), frozenset({"gram"})
        notes.append(
            f"no backward pass runs through {type(model).__name__} ({failed}): "
            "the drone metric and uniform ranks took the place of kfac and allocation by loss"
        )
        logger.warning(notes[-1])
    found = Calibration(groups, _curvature_name(backward, labeled), frozenset(common), failed, notes)

    def part_of(batch: Batch) -> Tensor | None:
        loss = step(batch)
        return loss if loss is not None and loss.requires_grad else None  # it may depend on no site of a window

    def in_passes(done: Collection[str], groups: Groups = groups) -> Iterator[StatisticsWindow]:
        for window in _parts(groups, model, at_once if waiting is not None else len(groups)):
            if window.name not in done:
                with work.running(None):
                    batches: Iterable[Batch] = progress(runs, what="calibrating", total=len(runs))
                    found = gather(model, window.groups, batches, part_of, needs=needs, common=common)
                window.moments.update(found)
                del found
                yield window

    passes = f"in whole passes, {at_once} blocks at a time"
    if walk is None:
        found.gathered = in_passes
        found.how = passes if waiting is not None else found.how
        return found
    walked = walk
    walked.run = _returning(step, walked.run)

    def walking(done: Collection[str]) -> Iterator[StatisticsWindow]:
        known = set(done)
        try:
            for window in gather_layerwise(walked, groups, needs=needs, common=common, done=known, show=show_steps):
                known.add(window.name)
                yield window
            return
        except LayerwiseError as error:  # other text takes another way than the example that was tried
            if processes is not None and processes.size > 1:  # the others go on walking
                raise ModelError(
                    f"{type(model).__name__} cannot be walked block by block ({error}). Run it in a single process."
                ) from error
            _note_unwalkable(model, error, notes)
        walked.forget_all()
        found.how = passes
        yield from in_passes(known, not_done(groups, walked.order, needs, known))

    found.how = f"block by block, {walk.order.tail} blocks"
    found.gathered = walking
    return found


def without_data(model: PreTrainedModel, names: Sequence[str]) -> Calibration:
    """For methods that read none: a window for each block, without statistics."""
    groups: Groups = {name: (name,) for name in names}

    def gathered(done: Collection[str]) -> Iterator[StatisticsWindow]:
        for block, own in split_by_block(groups, model).items():
            if (window := StatisticsWindow(block or "outside", own, {})).name not in done:
                yield window

    return Calibration(groups, "none", gathered=gathered)


class _Work:
    """A model that is run over and over, its weights brought in as they are needed."""

    def __init__(self, model: PreTrainedModel, weights: WeightLoader, blocks: Sequence[str]) -> None:
        self.model = model
        self.device = weights.device
        self.blocks = blocks
        self.running = ready(model, weights, blocks)

    def walk(
        self, names: Sequence[str], batches: Sequence[Batch], first: Batch, waiting: HiddenStateStore, backward: bool
    ) -> LayerwiseRunner:
        """The model before its first step, tried on one example."""

        def run(batch: Batch) -> Any:
            return forward(self.model, batch.inputs)

        device = self.device
        with self.running(None):
            order, structures = trace_blocks(
                self.model, names, run, first, waiting, backward=backward, held=self.running, device=device
            )
        walk = LayerwiseRunner(
            self.model, order, run, batches, waiting, held=self.running, device=device, name="calibration"
        )
        walk.structures = structures
        return walk

    def why_no_backward(
        self,
        groups: Mapping[str, Sequence[str]],
        batch: Batch,
        step: Step,
        needs: frozenset[str],
        walk: LayerwiseRunner | None,
    ) -> str | None:
        """Try one example; what stopped it, or None. Errors about numbers or data are raised as they are."""
        try:
            if walk is None:
                with self.running(None):
                    gather(self.model, groups, [batch], step, needs=needs)
            else:
                trial = LayerwiseRunner(
                    self.model, walk.order, _returning(step, walk.run), [batch], walk.store,
                    held=self.running, device=walk.device, name="trial",
                )  # fmt: skip
                trial.structures = walk.structures
                for _ in gather_layerwise(trial, {}, needs=needs, common={}, always=True):
                    pass
        except EckartError:
            raise
        except Exception as error:  # whatever a model's own code raises
            if is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {error}"
        return None


def _note_unwalkable(model: PreTrainedModel, error: LayerwiseError, notes: list[str]) -> None:
    notes.append(f"{type(model).__name__} cannot be walked block by block ({error}): whole passes instead")
    logger.warning(notes[-1])


def _single(batches: Sequence[Batch]) -> list[Batch]:
    """Every example as a batch of its own."""
    return [batch.rows(i, i + 1) for batch in batches for i in range(len(batch))]


def _returning(step: Step, run: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
    """What a walk runs: the loss where there is one."""

    def both(batch: Batch) -> Any:
        return step(batch) if torch.is_grad_enabled() else run(batch)

    return both


def _parts(groups: Groups, model: PreTrainedModel, at_once: int) -> Iterator[StatisticsWindow]:
    """Groups, so many blocks' at a time."""
    blocks = list(split_by_block(groups, model).values())
    if len(blocks) == 1:  # there is no list of blocks
        blocks = [{leader: members} for leader, members in groups.items()]
    for start in range(0, len(blocks), at_once):
        together = {leader: members for part in blocks[start : start + at_once] for leader, members in part.items()}
        # By what it holds: another run may cut the blocks into other parts.
        leaders = list(together)
        name = WHOLE if at_once >= len(blocks) else f"{leaders[0]} to {leaders[-1]}, {len(leaders)} inputs"
        yield StatisticsWindow(name, together, {})


def _common_calls(model: PreTrainedModel, names: Sequence[str], first: Batch) -> dict[str, frozenset[int]]:
    """Calls on what the examples of a batch have in common, found by running one example and the same one twice."""
    twice = {k: torch.cat([v, v]) if v.dim() and len(v) == len(first) else v for k, v in first.inputs.items()}
    return common_calls(model, names, lambda: forward(model, first.inputs), lambda: forward(model, twice))


def _curvature_name(backward: bool, labeled: bool) -> str:
    return "none" if not backward else "labels" if labeled else "sampled"
