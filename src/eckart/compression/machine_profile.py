"""The profile of this machine for a model: measured once, kept with the run, read from a file and written to one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from eckart.allocation import RankMultiples
from eckart.compression.context import CompressionContext
from eckart.compression.curves import Shapes
from eckart.compression.measure import copy_to_time
from eckart.compression.options import dtype_of
from eckart.compression.plan_builder import Solved
from eckart.compression.pricing import layer_sizes
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.compression.size_limits import largest_joint_rank
from eckart.errors import UsageError
from eckart.forms import form_named
from eckart.speed import phases
from eckart.speed.clock import Run
from eckart.speed.measure_profile import measure_profile
from eckart.speed.profile import SLICED, LayerRequest, Profile, grid_of_ranks

logger = logging.getLogger(__name__)

STAGE = "profile"
"""The stage of a run under which its profile is stored: a run that is resumed plans by the same seconds."""


def find_profile(context: CompressionContext, settings: Settings, recipe: Recipe, solved: Solved) -> Profile:
    """The profile of the run, of its file, or a new one.

    Raises:
        UsageError: the file is no profile for this model, type of numbers and kind of device.
    """
    workspace = context.workspace
    store, processes = workspace.store, workspace.processes
    content: dict[str, object] = {}
    failed: BaseException | None = None
    if processes.main:
        try:
            if not store.entries(STAGE):
                store.write(STAGE, STAGE, {}, _open(context, settings, recipe, solved).to_json())
            content = store.read(STAGE, STAGE)[1]
        except Exception as error:
            failed = error
    processes.raise_if_any_failed(failed)
    return Profile.from_json(processes.broadcast(({}, content))[1])


def _open(context: CompressionContext, settings: Settings, recipe: Recipe, solved: Solved) -> Profile:
    dtype, device = _computes_in(context, recipe), context.weights.device
    file = Path(recipe.profile) if recipe.profile is not None else None
    if file is not None and file.exists():
        profile = Profile.read(file, dtype=dtype, device=device)
        tokens = recipe.latency_batch_size * recipe.latency_length
        if profile.tokens != tokens:
            raise UsageError(
                f"--profile {file}: was measured on {profile.tokens} tokens at a time, and this run asks for "
                f"{recipe.latency_batch_size} x {recipe.latency_length}. Give --latency-batch-size and "
                "--latency-length as they were, or another file, which is then measured."
            )
        if profile.model_seconds is None:
            raise UsageError(
                f"--profile {file}: does not say how long the whole model takes; name another file, which is then "
                "measured."
            )
        return profile
    shapes = {site.name: site.shape for site in context.sites.chosen}
    profile = measure_profile(
        _requests(shapes, settings, solved, context.multiples(recipe)),
        tokens=recipe.latency_batch_size * recipe.latency_length,
        dtype=dtype,
        device=device,
        forward=forward_of(context.model, context, recipe),
    )
    if file is not None:
        profile.write(file)
    return profile


def _computes_in(context: CompressionContext, recipe: Recipe) -> torch.dtype:
    """The type that the compressed model computes in."""
    return dtype_of(recipe) or context.dtype_on_disk or context.model.dtype


def forward_of(model: PreTrainedModel, context: CompressionContext, recipe: Recipe) -> Run:
    """One pass of a model in the type that the compressed model computes in."""
    model = copy_to_time(model, _computes_in(context, recipe), context.weights.device)
    phase = phases.phases_of(model, decode=False)[0]
    return phases.prepare(model, phase, recipe.latency_batch_size, recipe.latency_length)


def _requests(shapes: Shapes, settings: Settings, solved: Solved, multiples: RankMultiples) -> Iterator[LayerRequest]:
    """Every layer that a plan may hold, at a grid of its ranks."""
    for rows, columns in dict.fromkeys(shapes.values()):
        yield LayerRequest("dense", columns, (rows,))
        for form in settings.site_forms:
            kind = form_named(form)
            if kind.blocks(rows, columns) != (None,):
                raise UsageError(
                    f"--form {form}: its sizes in blocks are not measured. Use --form lowrank, joint or pivoted with "
                    "--objective latency, --speedup or --profile."
                )
            grid = grid_of_ranks(kind.max_rank(rows, columns), multiples.of((rows, columns), form))
            if grid:
                yield LayerRequest(form, columns, (rows,), grid)
    for members in solved.joint:
        heights, columns = tuple(shapes[name][0] for name in members), shapes[members[0]][1]
        largest = largest_joint_rank([shapes[name] for name in members], settings.joint_form, planned=False)
        grid = grid_of_ranks(largest, multiples.of((sum(heights), columns), settings.joint_form))
        if grid:
            yield LayerRequest(settings.joint_form, columns, heights, grid)
    for layer in solved.sliced:
        reader = shapes[layer.reader]
        grid = grid_of_ranks(layer.width - 1, multiples.of(reader, SLICED))
        if grid:
            yield LayerRequest(SLICED, *layer_sizes([shapes[name] for name in layer.writers], reader), grid)
