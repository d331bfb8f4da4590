"""The only file that knows the order of a run.

Recipe -> model -> sites -> statistics, window by window -> factors -> plan -> forms in place -> refit -> measure ->
report. What is made of a window is kept in a store, in memory or in a journal: a run that was broken off goes on
behind its last entry.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.allocation import DENSE, Choice, Plan
from eckart.calibration import too_few
from eckart.calibration.layerwise import StatisticsWindow, all_blocks
from eckart.checkpoint.description import attach_config
from eckart.compression.assemble import Assembly
from eckart.compression.budget import Budget
from eckart.compression.embeddings import factor_embeddings
from eckart.compression.factor_store import FactorStore, FactorSummary
from eckart.compression.plan_builder import largest_choices, make_plan
from eckart.compression.prepare import CompressionContext, prepare
from eckart.compression.recipe import Recipe, make_recipe
from eckart.compression.result import Result
from eckart.compression.settings import Settings
from eckart.compression.workspace import Workspace
from eckart.distributed import OtherProcessError
from eckart.errors import ModelError, NumericalError
from eckart.evaluation.quality import distance_to_original, measure_quality
from eckart.evaluation.sizes import count_sizes
from eckart.forms import form_named
from eckart.methods import Method, method_named
from eckart.model import Sites, WeightLoader, factored_modules, fuse_experts, unshare_storage
from eckart.report.record import build_report
from eckart.storage.store import MemoryStore


def compress(
    model: PreTrainedModel,
    tokenizer: Any = None,
    *,
    data: Any = None,
    method: str | Method | None = None,
    recipe: Recipe | None = None,
    source_folder: str | Path | None = None,
    workspace: Workspace | None = None,
    **options: Any,
) -> Result:
    """Factor the weights of a model.

    Args:
        model: any transformers model, in any floating-point dtype; it is not changed.
        tokenizer: needed when the data is text.
        data: a file, folder, hub data set, "stdlib", "self", a list of strings, or model-ready batches.
        method: a name, or a :class:`eckart.methods.Method` of your own.
        recipe: everything else; or give its fields as keyword arguments.
        source_folder: where the model came from: its other files are carried over, its pooling is read.
        workplace: where to compute and to keep things; all in memory and in one process unless told otherwise.
        **options: fields of :class:`eckart.Recipe`, such as `keep=0.5` or `targets=["*.mlp.*"]`.

    Returns:
        The compressed model with plan and report.

    Raises:
        EckartError: naming what failed, where, and what to do.
    """
    asked = _recipe(recipe, data, method, options)
    chosen = method_named(method if method is not None else asked.method)
    settings = Settings.of(chosen, asked)
    work = prepare(model, tokenizer, data, asked, [settings], [asked.keep], source_folder, workspace or Workspace())
    settings = work.possible(settings)
    return _finish(work, settings, asked, *_shelf(work, settings, asked, asked.keep))


def compare(
    model: PreTrainedModel,
    tokenizer: Any = None,
    *,
    methods: Sequence[str | Method],
    keeps: Sequence[float],
    data: Any = None,
    recipe: Recipe | None = None,
    source_folder: str | Path | None = None,
    **options: Any,
) -> Iterator[tuple[str, float, Result]]:
    """Compress a model by several methods at several sizes; the data is read and run through it once.

    Args:
        model: as for :func:`compress`.
        tokenizer: as for :func:`compress`.
        methods: names or methods; the rest of the recipe is the same for all.
        keeps: fractions.
        data: as for :func:`compress`.
        recipe: as for :func:`compress`.
        source_folder: as for :func:`compress`.
        **options: as for :func:`compress`.

    Yields:
        Method name, keep, and the result; drop one before taking the next to hold one in memory.
    """
    asked = _recipe(recipe, data, None, options)
    rows = [Settings.of(method_named(method), asked) for method in methods]
    work = prepare(model, tokenizer, data, asked, rows, keeps, source_folder, Workspace())
    windows = list(work.timed(work.calibration.windows()))
    shared = dict(work.seconds)
    for row in rows:
        settings = work.possible(row)
        work.seconds = dict(shared)
        work.workspace.store = MemoryStore()
        shelf, summary = _shelf(work, settings, asked, max(keeps), windows)
        own = dict(work.seconds)
        for keep in keeps:
            work.seconds = dict(own)
            work.workspace.store = MemoryStore()  # the factors stay on the shelf
            changed = asked.model_copy(update={"keep": keep, "method": settings.method.name})
            yield settings.method.name, keep, _finish(work, settings, changed, shelf, summary)


def _recipe(recipe: Recipe | None, data: Any, method: str | Method | None, options: Mapping[str, Any]) -> Recipe:
    content: dict[str, Any] = recipe.model_dump(exclude_unset=True) if recipe is not None else {}
    content.update(options)
    if isinstance(data, (str, Path)):
        content["data"] = str(data)
    if isinstance(method, str):
        content["method"] = method
    return make_recipe(content, "eckart.compress")


def _shelf(
    work: CompressionContext,
    settings: Settings,
    recipe: Recipe,
    keep: float,
    kept: list[StatisticsWindow] | None = None,
) -> tuple[FactorStore, FactorSummary]:
    """Factors of every site that the data reached, up to the rank that `keep` may ask for.

    Args:
        work: model and statistics.
        settings: the method.
        recipe: plan file and budget.
        keep: the largest of the keeps that factors are for.
        kept: windows that other methods use too.
    """
    sites = {site.name: site for site in work.sites.chosen}
    budget = Budget.of_recipe(work.model, work.sites, recipe.model_copy(update={"keep": keep}))
    shelf = FactorStore(work.workspace.store, work.workspace.processes, work.weights.device)
    bases = work.bases(settings, recipe)
    limits = largest_choices(work.sites, settings, recipe, keep, budget, bases)

    def windows(done: Collection[str]) -> Iterator[StatisticsWindow]:
        return work.timed(work.calibration.windows(done) if kept is None else iter(kept))

    before = work.seconds.get("calibration", 0.0)
    with work.clock("factorization"):
        shelf.fill(
            windows,
            work.model,
            sites,
            settings,
            limits,
            curve=settings.allocation == "loss" and recipe.plan is None,
            bases=bases,
            reuse=kept is not None,
        )
    gathering = work.seconds.get("calibration", 0.0) - before
    work.seconds["factorization"] = round(work.seconds["factorization"] - gathering, 3)
    summary = shelf.summary()
    if not summary.losses:
        raise ModelError(
            "the calibration data reached none of the chosen sites; use text that runs through them, "
            "or a method that needs no data: --method svd."
        )
    return shelf, summary


def _finish(
    work: CompressionContext, settings: Settings, recipe: Recipe, shelf: FactorStore, summary: FactorSummary
) -> Result:
    """Plan, put the factors in place, refit, measure, report."""
    sites, model, calibration = work.sites, work.model, work.calibration
    dense = {n: "no token of the calibration data reached it" for n in work.names if n not in summary.losses}
    dense |= summary.dense
    notes = [*settings.notes, *calibration.notes, *too_few(summary.seen)]
    notes += [f"{name}: left dense, {reason}" for name, reason in dense.items()]
    notes += summary.notes
    budget = Budget.of_recipe(model, sites, recipe)
    plan = make_plan(sites, settings, recipe, summary.losses, dense, budget, work.mark, work.bases(settings, recipe))
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    assembly = Assembly(model, sites.chosen, work.weights, work.workspace, dtype)
    with work.clock("replacement"):
        compressed, found = assembly.put(plan, shelf)
    notes += found
    with work.clock("embeddings") if recipe.embeddings != "dense" else nullcontext():
        embedded = factor_embeddings(
            model, compressed, recipe, work.data, work.weights, work.workspace.processes, dtype
        )
    notes += embedded.notes
    _lean(compressed, work.workspace.streaming)
    measured: dict[str, Any] | None = None
    if settings.refit and work.data is not None:
        with work.clock("refit"):
            compressed, measured = _refitted(work, settings, recipe, plan, compressed, assembly, shelf, summary, notes)
    plan = with_changes(plan, choices=_as_stored(compressed, sites, plan))
    fuse_experts(compressed)
    if factored_modules(compressed):
        attach_config(compressed)
    with work.clock("measuring"):
        if work.held is not None and measured is None:
            measured = _measured(work, compressed)
    _lean(compressed, False)
    names = work.names
    report = build_report(
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        method=settings.method,
        form=" and ".join(sorted({c.form for c in plan.choices.values()} - {DENSE})) or DENSE,
        allocation=settings.allocation if recipe.plan is None else "plan",
        model=model,
        sites=sites,
        plan=plan,
        before=count_sizes(model, names, work.stored_dtype),
        after=count_sizes(compressed, names),
        unreached=dense,
        curvature=calibration.curvature,
        data=work.data.description if work.data is not None else None,
        quality=measured,
        notes=notes,
        seconds=work.seconds,
        effective_ranks=summary.effective_ranks,
    )
    report["calibrated"] = calibration.how
    embedded.join(report)
    if not work.workspace.streaming:
        unshare_storage(compressed, model)
    return Result(compressed, plan, report, recipe, work.tokenizer, work.source_folder)


def _refitted(
    work: CompressionContext,
    settings: Settings,
    recipe: Recipe,
    plan: Plan,
    compressed: PreTrainedModel,
    assembly: Assembly,
    shelf: FactorStore,
    summary: FactorSummary,
    notes: list[str],
) -> tuple[PreTrainedModel, dict[str, Any] | None]:
    """The model solved again on its own inputs, unless held-out text says that it was better before.

    Returns:
        The better of the two, and what was measured of it, if it was.
    """
    assert work.data is not None
    if work.held is None and not recipe.refit:
        notes.append("the refit was left out: there is too little text to hold some out and check it by")
        return compressed, None
    calibration = work.calibration
    measured: dict[str, Any] | None = None
    fixed = {n for n, c in plan.choices.items() if c.form != DENSE and not form_named(c.form).refits}
    notes += [f"{name}: not refitted, form {plan.choices[name].form} cannot be" for name in sorted(fixed)]
    try:
        fitted, found = assembly.refitted(
            compressed, plan, shelf, settings, calibration.groups, work.data.batches,
            [name for name in summary.losses if name not in fixed], sorted(calibration.common),
        )  # fmt: skip
        _lean(fitted, work.workspace.streaming)
        if work.held is not None and fitted is not compressed:
            before = measured = _measured(work, compressed)
            after = _measured(work, fitted)
            if distance_to_original(after) > distance_to_original(before):
                far, farther = distance_to_original(before), distance_to_original(after)
                found = [f"held-out distance to the original {far:.4g} before it, {farther:.4g} after"]
                fitted = compressed
            else:
                measured = after
    except (NumericalError, OtherProcessError) as error:  # all processes take the same way
        found, fitted = [str(error)], compressed
    if fitted is compressed:
        found = [reason if "left out" in reason else f"the refit was left out: {reason}" for reason in found]
    notes += found
    return fitted, measured


def _measured(work: CompressionContext, compressed: PreTrainedModel) -> dict[str, Any]:
    """How near the compressed model is to the original, by the first process, for all."""
    assert work.held is not None
    processes = work.workspace.processes
    measured: dict[str, Any] = {}
    failed: BaseException | None = None
    if processes.main:
        blocks = all_blocks(work.model)
        smaller = WeightLoader(compressed, work.workspace.compute_stored)
        try:
            with work.weights.streaming(blocks), smaller.streaming(blocks):
                measured = measure_quality(compressed, work.model, work.held, work.pooling)
        except Exception as error:
            failed = error
    processes.raise_if_any_failed(failed)
    found: dict[str, Any] = processes.broadcast(measured)
    return found


def _lean(model: PreTrainedModel, lean: bool) -> None:
    """Whether forms do without working memory."""
    for module in factored_modules(model).values():
        module.lean = lean


def _as_stored(compressed: PreTrainedModel, sites: Sites, plan: Plan) -> dict[str, Choice]:
    """The choices as they came out, fallbacks included."""
    choices: dict[str, Choice] = {}
    for site in sites.chosen:
        module: Any = compressed.get_submodule(site.name)
        choices[site.name] = (
            Choice(module.form, module.rank, module.block, plan.choices[site.name].basis)
            if hasattr(module, "form")
            else Choice(DENSE)
        )
    return choices
