"""What comes before the long work: sites found, refusals made, data read, statistics made ready to gather."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.calibration import Calibration, calibrate, calibrate_without_data, hold_out, take_samples
from eckart.checkpoint.fingerprint import fingerprint, weights_checksum
from eckart.checkpoint.stored import stored_dtype, stored_tensors
from eckart.compression.basis_groups import adjacent
from eckart.compression.budget import Budget
from eckart.compression.context import CompressionContext
from eckart.compression.curves import Losses
from eckart.compression.factor_store import STAGE as FACTORS
from eckart.compression.joint_groups import possible_groups
from eckart.compression.open_run import CompressionRun
from eckart.compression.plan_builder import Solved, make_plan
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.compression.training_text import whole_passes
from eckart.config import DEFAULT_BATCH_SIZE, DISTILLED, REFINED, default_samples
from eckart.data import MODEL_READY, CalibrationData, Pooling, digest_batches, load_data, model_kind
from eckart.errors import CheckpointError, UsageError
from eckart.evaluation.sentence import find_pooling
from eckart.forms import form_named
from eckart.linalg import require_finite
from eckart.model import WeightLoader, find_sites, saved_embedding_parameters, with_separate_experts
from eckart.moments import needs_backward

TEXT = "text"
"""The stage of a run under which the digest of the calibration text is stored."""


def prepare(run: CompressionRun, data: Any, rows: Sequence[Settings], keeps: Sequence[float]) -> CompressionContext:
    """Do everything up to the statistics, once for all methods.

    Args:
        run: the opened model.
        data: calibration data; None for those that the recipe names.
        rows: settings of the methods that will run.
        keeps: fractions that will be asked for.

    Raises:
        EckartError: something that was asked for cannot be, as far as this can be known before the long work.
    """
    recipe, workspace, folder = run.recipe, run.workspace, run.source_folder
    if recipe.refine_samples is not None and not any(settings.trains for settings in rows):
        raise UsageError("--refine-samples: nothing is trained on them. Give --refine or --distil, or leave it out.")
    model = with_separate_experts(run.model)
    sites = find_sites(model, recipe.targets, recipe.ignore)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            require_finite(parameter.detach(), name)
    names = [site.name for site in sites.chosen]
    context = CompressionContext(
        model=model,
        tokenizer=run.tokenizer,
        sites=sites,
        data=None,
        refining=None,
        distilling=None,
        held_out=None,
        calibration=calibrate_without_data(model, names),
        pooling=_find_pooling(folder, model, run.tokenizer),
        source_folder=folder,
        fingerprint=fingerprint(model),
        dtype_on_disk=stored_dtype(stored_tensors(folder)) if folder is not None else None,
        workspace=workspace,
        weights=WeightLoader(model, workspace.compute),
        warnings=run.warnings,
    )
    for settings in rows:
        for keep in keeps:
            _check_budget(context, settings, recipe.model_copy(update={"keep": keep}))
    needs = _all_needs(rows, recipe)
    data = data if data is not None else recipe.data
    refines = any(settings.refines for settings in rows)
    distils = any(settings.distils for settings in rows) and not workspace.streaming
    if not needs and data is None and not refines and not distils:
        return context
    with context.timer.step("data"):
        _load(context, data, recipe, refines=refines, distils=distils)
        _check_same_text(context)
    if needs:
        context.calibration = start_calibration(context, rows, recipe, model, context.weights)
    return context


def start_calibration(
    context: CompressionContext,
    rows: Sequence[Settings],
    recipe: Recipe,
    model: PreTrainedModel,
    weights: WeightLoader,
) -> Calibration:
    """Make ready to gather the statistics that all methods of a run need.

    Args:
        context: its sites and data.
        rows: settings of the methods.
        recipe: curvature and seed.
        model: that runs: the original, or one with the same sites.
        weights: of the model.
    """
    assert context.data is not None
    needs, workspace = _all_needs(rows, recipe), context.workspace
    fallback = _all_needs([settings.without_gradients() for settings in rows], recipe)
    with context.timer.step("calibration"):
        return calibrate(
            model,
            context.names,
            context.data,
            needs=needs,
            curvature=recipe.curvature,
            seed=recipe.seed,
            pooling=context.pooling,
            fallback_needs=None if needs_backward(fallback) else fallback,
            weights=weights,
            hidden_states=workspace.hidden_states,
            blocks_at_once=workspace.at_once,
            processes=workspace.processes,
            grow=recipe.batch_size is None,
        )


def _all_needs(rows: Sequence[Settings], recipe: Recipe) -> frozenset[str]:
    """The statistics that all methods of a run need together."""
    return frozenset().union(*(settings.needs(planned=recipe.plan is not None) for settings in rows))


def _check_budget(context: CompressionContext, settings: Settings, recipe: Recipe) -> None:
    """Refuse a budget that is too small, for embeddings too, or a plan file that does not fit."""
    sites, model = context.sites, context.model
    largest = max(min(site.shape) for site in sites.chosen)
    if recipe.rank_multiple is not None and recipe.rank_multiple > largest:
        raise UsageError(
            f"--rank-multiple {recipe.rank_multiple:,}: the largest rank that a weight of this model can have is "
            f"{largest:,}, so no rank is a multiple of it. Give a smaller one, such as --rank-multiple 8."
        )
    if settings.stock and recipe.plan is None:  # which layers can lose neurons shows when the model runs
        return
    by_name = {site.name: site for site in sites.chosen}
    form = form_named(settings.site_forms[0])
    flat: dict[str, Losses] = {
        site.name: {b: torch.zeros(form.full_rank(*site.shape, b) + 1) for b in form.blocks(*site.shape)}
        for site in sites.chosen
    }
    bases = adjacent(sites.chosen, model, recipe.layers_per_basis)  # as many as there may be
    groups = possible_groups(sites.chosen, model) if settings.joins else ()
    joint = {group: torch.zeros(sum(form.full_rank(*by_name[name].shape) for name in group) + 1) for group in groups}
    budget = Budget.of_recipe(model, sites, recipe)
    rest = (budget, context.fingerprint, context.multiples(recipe))
    try:
        make_plan(sites, settings, recipe, Solved(flat, bases=bases, joint=joint), *rest)
    except UsageError:
        # Which of these groups read one input is not known yet: name a size that needs none of them.
        make_plan(sites, settings, recipe, Solved(flat, bases=bases), *rest)
        raise
    saved_embedding_parameters(
        model, recipe.embeddings, recipe.embeddings_keep, recipe.ignore
    )  # refuses what cannot be


def _find_pooling(folder: Path | None, model: PreTrainedModel, tokenizer: Any) -> Pooling | None:
    pooling = find_pooling(folder, model)
    return pooling.reading(tokenizer) if pooling is not None and tokenizer is not None else pooling


def _load(context: CompressionContext, data: Any, recipe: Recipe, *, refines: bool, distils: bool) -> None:
    """Batches to calibrate on, and others to measure on: of N samples asked for, N calibrate.

    Args:
        context: is given them.
        data: that the user named.
        recipe: how much of it.
        refines: whether more is read, to train blocks on one after another.
        distils: whether more is read, to train all of them together.
    """
    model, size = context.model, recipe.batch_size or DEFAULT_BATCH_SIZE
    kind = model_kind(model.config, model) if context.pooling is None else "encoder"
    wanted = recipe.num_samples or default_samples(kind)
    extra = max(1, -(-wanted // size) // 8)
    sampled = isinstance(data, str) and data == "self"  # every token of more text would have to be written first
    times = max(REFINED * refines, DISTILLED * distils, 1) if not sampled else 1
    most = recipe.refine_samples or times * wanted if refines or distils else wanted
    loaded = load_data(
        data,
        tokenizer=context.tokenizer,
        model=model,
        config=recipe.data_config,
        split=recipe.data_split,
        column=recipe.data_column,
        target_column=recipe.data_target_column,
        label_column=recipe.data_label_column,
        revision=recipe.data_revision,
        num_samples=recipe.num_samples,
        extra_samples=extra * size + max(0, most - wanted),
        max_seq_length=recipe.max_seq_length,
        batch_size=size,
        seed=recipe.seed,
        pooling=context.pooling,
    )
    rest, context.held_out = hold_out(loaded, min(extra, len(loaded) // 9 or int(len(loaded) > 1)))
    context.data = part = rest
    if not refines and not distils:
        return
    given = isinstance(data, CalibrationData) or loaded.description.get("source") == MODEL_READY
    if given and recipe.num_samples is None:  # of batches that the user made, all calibrate
        wanted = rest.num_examples
    if distils:
        part = context.distilling = take_samples(part, recipe.refine_samples or _of_whole_passes(rest, wanted))
    if refines:
        part = context.refining = take_samples(part, recipe.refine_samples or REFINED * wanted)
    context.data = take_samples(part if part.num_examples >= wanted else rest, wanted)


def _of_whole_passes(rest: CalibrationData, wanted: int) -> int:
    """How much text a distillation reads: all there is for one pass or, where that is little, a part for several."""
    most = DISTILLED * wanted
    return -(-most // whole_passes(most, rest.num_examples))


def _check_same_text(context: CompressionContext) -> None:
    """Refuse to resume an unfinished run on other text.

    Raises:
        CheckpointError: naming what differs.
    """
    assert context.data is not None
    store = context.workspace.store
    parts = (context.distilling or context.refining or context.data, context.held_out)
    batches = [batch for part in parts if part is not None for batch in part.batches]
    now = {"sha256": digest_batches(batches), "num_tokens": sum(batch.num_tokens for batch in batches)}
    if context.workspace.streaming:
        now["weights"] = weights_checksum(context.model)
    if not store.entries(TEXT):
        if store.entries(FACTORS):
            raise CheckpointError(
                "the unfinished run of this output has lost the record of its text, so it cannot be resumed. Pass "
                "--restart to discard it, or choose another --output-dir."
            )
        store.write(TEXT, TEXT, {}, now)
    elif (before := store.read(TEXT, TEXT)[1]) != now:
        raise CheckpointError(
            f"the unfinished run of this output was calibrated on other text, tokens, labels or weights ({before}, now "
            f"{now}). Give the same --data, pass --restart to discard that run, or choose another --output-dir."
        )
