"""The order of a calibration: what is tried on one example, and how the statistics of all of them are gathered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.calibration.backward_probe import why_no_backward
from eckart.calibration.coverage import why_useless
from eckart.calibration.forward_context import ForwardContext, forward_context
from eckart.calibration.grow_batches import grow_batches, running_memory, tokens_at_once
from eckart.calibration.layerwise import (
    Groups,
    HiddenStateStore,
    LayerwiseError,
    LayerwiseRunner,
    StatisticsWindow,
    all_blocks,
    gather_layerwise,
    groups_to_gather,
    split_by_block,
    start_runner,
)
from eckart.calibration.losses import Loss, choose_loss
from eckart.calibration.progress import show_steps
from eckart.calibration.site_calls import calls_on_common_inputs, group_by_input
from eckart.calibration.whole_passes import WholePasses, one_example_each
from eckart.data import Batch, CalibrationData, Pooling
from eckart.data.explain import explaining
from eckart.data.inference import forward
from eckart.distributed import Processes
from eckart.errors import ModelError
from eckart.model import WeightLoader
from eckart.moments import Moments, Step, gather, needs_backward

logger = logging.getLogger(__name__)


@dataclass
class Calibration:
    """Windows of statistics, gathered when they are asked for.

    Attributes:
        groups: sites that share an input, in order of the forward pass.
        curvature: "sampled", "labels" or "none".
        common: sites that are also called on what all examples of a batch share, such as relative positions.
        backward_failed: why no backward pass runs, or None.
        notes: fallbacks taken.
        batch_tokens: how many tokens a batch may be joined up to, which changes no result; 0: batches stay as they are.
        how: the way the windows are gathered, in words.
        gather: gathers the windows but those of the given names.
    """

    groups: Groups
    curvature: str
    common: frozenset[str] = frozenset()
    backward_failed: str | None = None
    notes: list[str] = field(default_factory=list)
    batch_tokens: int = 0
    how: str = "at once"
    gather: Callable[[Collection[str]], Iterator[StatisticsWindow]] = field(default=lambda _: iter(()), repr=False)

    def windows(self, done: Collection[str] = ()) -> Iterator[StatisticsWindow]:
        """Gather, window by window; what was kept for a window is dropped when the next one is asked for.

        Args:
            done: names of windows that are not needed any more.
        """
        return self.gather(done)

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """The statistics of all sites that data reached, at the same time."""
        found: dict[str, Moments] = {}
        for window in self.windows():
            found |= {n: m for n, m in window.moments.items() if why_useless(m) is None}
        return found

    def note(self, text: str) -> None:
        """Note a fallback and warn of it."""
        self.notes.append(text)
        logger.warning(text)


def calibrate(
    model: PreTrainedModel,
    names: Sequence[str],
    data: CalibrationData,
    *,
    needs: frozenset[str],
    curvature: str = "auto",
    seed: int = 0,
    pooling: Pooling | None = None,
    fallback_needs: frozenset[str] | None = None,
    weights: WeightLoader | None = None,
    hidden_states: HiddenStateStore | None = None,
    blocks_at_once: int = 1,
    processes: Processes | None = None,
    grow: bool = False,
) -> Calibration:
    """Prepare to gather statistics of the named modules; the long work starts with the first window.

    Args:
        model: the model.
        names: sites.
        data: batches.
        needs: names of statistics, see :class:`eckart.methods.Method`.
        curvature: "auto" (own labels where the data has them, else draws), "sampled" or "labels".
        seed: of the draws.
        pooling: how sentence embeddings are made, for embedding models.
        fallback_needs: what is gathered where no backward pass runs; None: that is an error.
        weights: brings the model's weights to where they compute; None where they are there.
        hidden_states: keeps hidden states between blocks; given a store, the model is run block by block.
        blocks_at_once: how many blocks make a window where a model cannot be run block by block.
        processes: each gathers over its share of the batches.
        grow: join batches to larger ones, as far as the device gains by it and its memory is large enough.

    Raises:
        NumericalError: on values that are not finite, naming site and batch.
        ModelError: if a backward pass is needed, cannot run, and nothing may replace it.
        DataError: the model makes no loss of the data's labels.
    """
    weights, processes = weights or WeightLoader(model, None), processes or Processes()
    blocks = all_blocks(model)
    context = forward_context(model, weights, blocks)
    loss = choose_loss(model, data, needs, curvature, seed, pooling)
    example = data.batches[0].rows(0, 1)
    with context(None), explaining(model, example.inputs):
        groups = group_by_input(model, names, example, blocks if hidden_states is not None else ())
        common = calls_on_common_inputs(model, names, example)
    found = Calibration(groups, loss.name, frozenset(common))
    batches = processes.own_part(one_example_each(data.batches) if common else data.batches)
    if grow and not common:
        by_block = hidden_states is not None
        memory = running_memory(model, names, backward=needs_backward(needs), blockwise=by_block)
        found.batch_tokens = tokens_at_once(weights.device, memory)
        batches = grow_batches(batches, found.batch_tokens)

    runner: LayerwiseRunner | None = None
    if hidden_states is not None:
        try:
            runner = start_runner(
                model, names, batches, example, hidden_states, context=context, device=weights.device,
                name="calibration", backward=needs_backward(needs),
            )  # fmt: skip
            gather_layerwise(runner, groups, needs=needs, common=common)  # refuses what it cannot gather
        except LayerwiseError as error:
            runner = None
            found.note(_not_layerwise(model, error))

    if needs_backward(needs):
        try:
            found.backward_failed = _probe_backward(model, groups, needs, loss, example, context, runner)
        except LayerwiseError as error:
            runner = None
            found.note(_not_layerwise(model, error))
            found.backward_failed = _probe_backward(model, groups, needs, loss, example, context, runner)
    if found.backward_failed is not None:
        if fallback_needs is None:
            raise ModelError(
                f"{type(model).__name__}: no backward pass runs through it ({found.backward_failed}). "
                "Use a method that needs none: --method drone --allocation uniform."
            )
        needs = fallback_needs
        loss = choose_loss(model, data, needs, curvature, seed, pooling)
        found.curvature = loss.name
        found.note(
            f"no backward pass runs through {type(model).__name__} ({found.backward_failed}): "
            "the drone metric and uniform ranks took the place of kfac and allocation by loss"
        )

    at_once = blocks_at_once if hidden_states is not None else None
    passes = WholePasses(model, context, batches, loss.step, needs, common, at_once)
    if runner is None:
        found.gather = lambda done: passes.windows(groups, done)
        found.how = passes.description
    else:
        blockwise = runner
        blockwise.chain.run = _loss_or_output(loss.step, model)
        found.gather = lambda done: _layerwise_windows(found, blockwise, passes, processes, done)
        found.how = f"block by block, {runner.schedule.tail} blocks"
    return found


def calibrate_without_data(model: PreTrainedModel, names: Sequence[str]) -> Calibration:
    """For methods that read none: a window for each block, without statistics."""
    groups: Groups = {name: (name,) for name in names}

    def windows(done: Collection[str]) -> Iterator[StatisticsWindow]:
        for block, own in split_by_block(groups, model).items():
            if (window := StatisticsWindow(block or "outside", own, {})).name not in done:
                yield window

    return Calibration(groups, "none", gather=windows)


def _layerwise_windows(
    found: Calibration, runner: LayerwiseRunner, passes: WholePasses, processes: Processes, done: Collection[str]
) -> Iterator[StatisticsWindow]:
    """Block by block; in whole passes from where a text turns out to take another way than the example."""
    known, model = set(done), runner.model
    needs, common = passes.needs, passes.common
    try:
        for window in gather_layerwise(runner, found.groups, needs=needs, common=common, done=known, show=show_steps):
            known.add(window.name)
            yield window
        return
    except LayerwiseError as error:
        if processes.size > 1:  # the others continue block by block
            raise ModelError(
                f"{type(model).__name__} cannot be run block by block ({error}). Run it in a single process."
            ) from error
        found.note(_not_layerwise(model, error))
    runner.drop_all()
    found.how = passes.description
    yield from passes.windows(groups_to_gather(found.groups, runner.schedule, needs, known), known)


def _probe_backward(
    model: PreTrainedModel,
    groups: Groups,
    needs: frozenset[str],
    loss: Loss,
    example: Batch,
    context: ForwardContext,
    runner: LayerwiseRunner | None,
) -> str | None:
    """Why no backward pass runs on one example, or None."""

    def backward() -> None:
        if runner is None:
            with context(None):
                gather(model, groups, [example], loss.step, needs=needs)
            return
        plain = runner.chain.run
        runner.chain.run = _loss_or_output(loss.step, model)
        probe = LayerwiseRunner(
            runner.chain, [example], runner.hidden_states.store, context=context, name="backward probe"
        )
        try:
            for _ in gather_layerwise(probe, {}, needs=needs, common={}, always=True):
                pass
        finally:
            runner.chain.run = plain

    def without_gradients() -> None:
        with context(None):
            loss.step(example)

    return why_no_backward(backward, without_gradients, of_labels=loss.name == "labels")


def _loss_or_output(step: Step, model: PreTrainedModel) -> Callable[[Batch], Any]:
    """What runs block by block: the loss where gradients are wanted, else a plain forward."""

    def run(batch: Batch) -> Any:
        return step(batch) if torch.is_grad_enabled() else forward(model, batch.inputs)

    return run


def _not_layerwise(model: object, error: LayerwiseError) -> str:
    return f"{type(model).__name__} cannot be run block by block ({error}): whole passes instead"
