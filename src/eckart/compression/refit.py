"""Solve every factored weight again on the inputs that the compressed model gives it, and keep that if it is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.allocation import DENSE, Plan
from eckart.calibration import show_steps
from eckart.calibration.forward_context import forward_context
from eckart.calibration.grow_batches import grow_batches
from eckart.calibration.layerwise import LayerwiseError, LayerwiseRunner, all_blocks, start_runner
from eckart.compression.assemble import Assembly, set_lean
from eckart.compression.context import CompressionContext
from eckart.compression.factor_store import FactorStore
from eckart.compression.measure import measure_quality
from eckart.compression.recipe import Recipe
from eckart.compression.refit_groups import GroupRefit, refittable, share_bases
from eckart.compression.settings import SLICED, Settings
from eckart.compression.stages import Stages
from eckart.distributed import OtherProcessError, Processes
from eckart.distributed.memory import free_memory
from eckart.errors import ModelError, NumericalError
from eckart.evaluation.quality import distance_to_original
from eckart.forms import form_named
from eckart.model import WeightLoader, replace_module, serialize_module, shared_clone
from eckart.moments import Moments

SPARE = 0.25
"""The part of free memory that may be kept between the passes through one block."""

STAGE = "refitted"
"""The stage of a run under which the modules of refitted blocks are stored."""


def refit_if_better(
    context: CompressionContext,
    settings: Settings,
    recipe: Recipe,
    plan: Plan,
    compressed: PreTrainedModel,
    assembly: Assembly,
    factors: FactorStore,
    stages: Stages,
) -> tuple[PreTrainedModel, dict[str, Any] | None, list[str]]:
    """Refit a copy of the model, and return it unless held-out text says that it was better before.

    Returns:
        The better of the two models, its measured quality where it was measured, and notes.
    """
    assert context.data is not None
    if context.held_out is None and not recipe.refit:
        return compressed, None, ["the refit was left out: there is too little text to hold some out and check it by"]
    kinds = {name: form_named(c.form) for name, c in plan.choices.items() if c.form != DENSE}
    fixed = sorted(name for name, kind in kinds.items() if not kind.refits)
    notes = [f"{name}: not refitted, form {plan.choices[name].form} cannot be" for name in fixed]
    names = [name for name in factors.summary.losses if name not in fixed]
    measured: dict[str, Any] | None = None
    try:
        with context.timer.step("refit"):
            fitted, found = refit_blocks(context, settings, plan, compressed, assembly, factors, names)
        set_lean(fitted, context.workspace.streaming)
        if context.held_out is not None and fitted is not compressed:
            with context.timer.step("measuring"):
                before = measured = measure_quality(context, compressed)
                if not before:
                    return _unchecked(recipe, compressed, fitted, [*notes, *found])
                after = measure_quality(context, fitted)
                fitted, after, more = _keep_slices_if_better(context, plan, compressed, fitted, after)
            found += more
            near, far = distance_to_original(before), distance_to_original(after)
            stages.add("factors", near, kept=True)
            stages.add("refit", far, kept=far <= near)
            if far > near:
                found = [f"held-out distance to the original {near:.4g} before it, {far:.4g} after"]
                fitted = compressed
            else:
                measured = after
    except (NumericalError, OtherProcessError) as error:  # all processes take the same way
        found, fitted = [str(error)], compressed
    if fitted is compressed:
        found = [reason if "left out" in reason else f"the refit was left out: {reason}" for reason in found]
    return fitted, measured, [*notes, *found]


def _unchecked(
    recipe: Recipe, compressed: PreTrainedModel, fitted: PreTrainedModel, notes: list[str]
) -> tuple[PreTrainedModel, None, list[str]]:
    """The refitted model where that was asked for; else the one before, since nothing says which is better."""
    if recipe.refit:
        return fitted, None, notes
    return compressed, None, [*notes, "the refit was left out: its outputs cannot be compared to check it by"]


def _keep_slices_if_better(
    context: CompressionContext, plan: Plan, compressed: PreTrainedModel, fitted: PreTrainedModel, after: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any], list[str]]:
    """Leave layers with fewer neurons as they were, unless held-out text says that their refit is better.

    Their weights were corrected for the neurons that went, and are of full rank: a refit has less to mend than in
    factors, and what it fits to the text at hand can cost more than that.

    Returns:
        The better of two refitted models, its measured quality, and notes.
    """
    sliced = [name for name, choice in plan.choices.items() if choice.form == SLICED]
    if not sliced:
        return fitted, after, []
    partly = shared_clone(fitted)
    for name in sliced:
        replace_module(partly, name, compressed.get_submodule(name))
    measured = measure_quality(context, partly)
    near, far = distance_to_original(measured), distance_to_original(after)
    if far <= near:
        return fitted, after, []
    note = (
        f"layers with fewer neurons were not refitted: held-out distance to the original {near:.4g}, with it {far:.4g}"
    )
    return partly, measured, [note]


def refit_blocks(
    context: CompressionContext,
    settings: Settings,
    plan: Plan,
    compressed: PreTrainedModel,
    assembly: Assembly,
    factors: FactorStore,
    names: Sequence[str],
) -> tuple[PreTrainedModel, list[str]]:
    """Make a copy of the compressed model in which every site is solved again, block by block.

    Both models run side by side: the original gives each site's inputs, the copy those that its earlier blocks give it
    now. A block that an interrupted run has finished is read from the store.

    Args:
        context: the original and the data.
        settings: the method.
        plan: ranks stay.
        compressed: the model with its forms in place; it is not changed.
        assembly: stores and installs modules.
        factors: hold statistics of the original's outputs.
        names: the sites that have statistics.

    Returns:
        The copy, or `compressed` itself where it cannot be run block by block; and notes.
    """
    calibration, processes = context.calibration, context.workspace.processes
    assert context.data is not None
    fitted = shared_clone(compressed)
    members = [name for group in calibration.groups.values() for name in group]
    try:
        before, now = _start_runners(context, fitted, members)
    except LayerwiseError as error:
        return compressed, [f"the refit was left out: {type(fitted).__name__} cannot be run block by block ({error})"]
    factored = set(names)  # of what stays dense nothing is solved, and nothing needs to be said here
    groups = {leader: own for leader, own in calibration.groups.items() if factored & set(own)}
    steps, notes = refittable(groups, before, sorted(calibration.common))

    def moments(name: str) -> Moments:
        found = factors[name].moments
        assert found is not None, "statistics are kept where a refit is asked for"
        return Moments.from_state({k: v.to(context.weights.device) for k, v in found.state().items()})

    def rows(name: str) -> Tensor | None:
        choice = plan.choices[name]
        if choice.basis is None:
            return None
        found = factors.sliced(choice.basis)
        return found.layer.rows_of(name, found.slicing.order[: choice.rank].sort().values)

    sites = {site.name: site for site in context.sites.chosen}
    refit = GroupRefit(
        sites, plan.choices, frozenset(names), moments, settings.method, processes, spare=lambda: _spare(context),
        rows=rows,
    )  # fmt: skip
    done = set(context.workspace.finished(STAGE))
    last = max(steps, default=-1)
    for step in [step for step in sorted(steps) if str(step) in done]:
        assembly.share_entry(STAGE, str(step))
        notes += _install(fitted, assembly, plan, step)
    first = next((step for step in sorted(steps) if str(step) not in done), last + 1)
    start = resume_step(first, before, now, processes) if 0 < first <= last else first
    try:
        for step in show_steps(range(start, last + 1), "refitting"):
            if step in steps and str(step) not in done:
                changed, found = refit.step(before, now, step, steps[step])
                context.workspace.keep(STAGE, str(step), *_serialize(fitted, changed, found))
                notes += _install(fitted, assembly, plan, step)
            refit.advance(before, now, step)
    except LayerwiseError as error:  # this text takes another way through the model than the example that was tried
        why = f"{type(fitted).__name__} cannot be run block by block ({error})"
        if processes.size > 1:  # the others go on running blocks
            raise ModelError(f"{why}. Leave the refit out with --no-refit.") from error
        fitted, notes = compressed, [f"the refit was left out: {why}"]
    before.drop_all()
    now.drop_all()
    return fitted, notes


def _start_runners(
    context: CompressionContext, fitted: PreTrainedModel, names: Sequence[str]
) -> tuple[LayerwiseRunner, LayerwiseRunner]:
    """The original and the copy, each before its first block."""
    assert context.data is not None
    workspace, batches = context.workspace, context.data.batches
    hidden_states = workspace.hidden_state_cache()
    mine = grow_batches(workspace.processes.own_part(batches), context.calibration.batch_tokens)

    def start(name: str, model: PreTrainedModel, weights: WeightLoader) -> LayerwiseRunner:
        context = forward_context(model, weights, all_blocks(model))
        first = batches[0].rows(0, 1)
        return start_runner(model, names, mine, first, hidden_states, context=context, device=weights.device, name=name)

    return (
        start("before", context.model, context.weights),
        start("now", fitted, WeightLoader(fitted, workspace.compute_stored)),
    )


def _install(fitted: PreTrainedModel, assembly: Assembly, plan: Plan, step: int) -> list[str]:
    """Put the stored modules of a step in place, and return its notes."""
    notes = assembly.install(fitted, STAGE, str(step))
    names = assembly.workspace.store.read(STAGE, str(step))[1]["sites"]
    share_bases(fitted, [group for group in plan.bases if set(group) <= set(names)], plan.choices)
    return notes


def _spare(context: CompressionContext) -> int:
    """Bytes that may be kept between the passes through one block.

    A part of what is free, and of a streamed run no more than its cache has left.
    """
    workspace, device = context.workspace, context.weights.device
    shared = 1 if device.type == "cuda" else workspace.processes.size
    free = int(SPARE * (free_memory(device) or 0)) // shared
    cache = workspace.hidden_states
    return free if cache is None or device.type == "cuda" else min(free, max(0, cache.memory - cache.in_memory))


def resume_step(first: int, before: LayerwiseRunner, now: LayerwiseRunner, processes: Processes) -> int:
    """The last step up to `first` whose hidden states are kept for both models in all processes."""
    kept = [float(before.can_resume_after(step) and now.can_resume_after(step)) for step in range(first)]
    found = {"kept": torch.tensor(kept)}
    processes.all_reduce(found)
    return next((step for step in range(first, 0, -1) if int(found["kept"][step - 1]) == processes.size), 0)


def _serialize(
    model: PreTrainedModel, names: Sequence[str], notes: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    specs: dict[str, Any] = {}
    for name in names:
        own, specs[name] = serialize_module(model.get_submodule(name))
        tensors |= {f"{name}/{key}": value for key, value in own.items()}
    return tensors, {"sites": specs, "notes": notes}
