"""The only file that knows the order of a run.

Recipe -> model -> sites -> moments -> problems -> plan -> factors in place -> refit -> measure -> report.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart import report as reporting
from eckart.allocate import DENSE, Choice, Plan
from eckart.calibrate import Calibration, calibrate, hold_out
from eckart.checkpoint.fingerprint import fingerprint
from eckart.checkpoint.plugin import mark
from eckart.checkpoint.stored import stored_dtype, stored_tensors
from eckart.data import CalibrationData, Kind, Pooling, kind_of
from eckart.data import load as load_data
from eckart.data.inference import progress
from eckart.errors import ModelError, NumericalError, UsageError
from eckart.linalg import Factorisation, Problem, factorise, require_finite
from eckart.measure import distance, quality, sizes
from eckart.methods import METHODS, Method, method_named
from eckart.model import Sites, cast, dense_weight, find_sites, has_head, own_storage, replace, shared_clone, store
from eckart.planning import Budget, Settings, make_plan
from eckart.recipe import Recipe, make_recipe
from eckart.recover import refit
from eckart.result import Result

logger = logging.getLogger(__name__)


def compress(
    model: PreTrainedModel,
    tokenizer: Any = None,
    *,
    data: Any = None,
    method: str | Method | None = None,
    recipe: Recipe | None = None,
    source_folder: str | Path | None = None,
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
        **options: fields of :class:`eckart.Recipe`, such as `keep=0.5` or `targets=["mlp.*"]`.

    Returns:
        The compressed model with plan and report.

    Raises:
        EckartError: naming what failed, where, and what to do.
    """
    asked = _recipe(recipe, data, method, options)
    chosen = method_named(method if method is not None else asked.method)
    settings = Settings.of(chosen, asked)
    work = _prepare(model, tokenizer, data, asked, [settings], source_folder)
    settings = work.possible(settings)
    return _finish(work, settings, asked, *_solve(work, settings))


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
    work = _prepare(model, tokenizer, data, asked, rows, source_folder)
    shared = dict(work.seconds)
    for row in rows:
        settings = work.possible(row)
        work.seconds = dict(shared)
        problems, solved = _solve(work, settings)
        own = dict(work.seconds)
        for keep in keeps:
            work.seconds = dict(own)
            changed = asked.model_copy(update={"keep": keep, "method": settings.method.name})
            yield settings.method.name, keep, _finish(work, settings, changed, problems, solved)


@dataclass
class _Work:
    """What all methods of a run share: the model, its sites, the data and what it said."""

    model: PreTrainedModel
    tokenizer: Any
    sites: Sites
    data: CalibrationData | None
    held: CalibrationData | None
    calibration: Calibration
    pooling: Pooling | None
    source_folder: Path | None
    mark: str
    stored_dtype: torch.dtype | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def clock(self, step: str) -> Iterator[None]:
        """Note the seconds of a step."""
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 3)

    def possible(self, settings: Settings) -> Settings:
        """The settings, or what is left of the default where no backward pass runs."""
        if self.calibration.backward_failed is None or "gradients" not in settings.needs():
            return settings
        drone = METHODS["drone"]
        method = with_changes(settings.method, metric=drone.metric, needs=drone.needs, exact_for=drone.exact_for)
        return with_changes(settings, method=method, allocation="uniform")


def _recipe(recipe: Recipe | None, data: Any, method: str | Method | None, options: Mapping[str, Any]) -> Recipe:
    content: dict[str, Any] = recipe.model_dump(exclude_unset=True) if recipe is not None else {}
    content.update(options)
    if isinstance(data, (str, Path)):
        content["data"] = str(data)
    if isinstance(method, str):
        content["method"] = method
    return make_recipe(content, "eckart.compress")


def _prepare(
    model: PreTrainedModel,
    tokenizer: Any,
    data: Any,
    recipe: Recipe,
    rows: Sequence[Settings],
    source_folder: str | Path | None,
) -> _Work:
    """Everything up to the statistics, gathered once for all methods."""
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"model: {model if isinstance(model, str) else type(model).__name__} is no transformers model. Pass what "
            "from_pretrained returns; a name or folder goes to eckart.compress_checkpoint or the command line."
        )
    sites = find_sites(model, recipe.targets, recipe.ignore)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            require_finite(parameter.detach(), name)
    names = [site.name for site in sites.chosen]
    folder = Path(source_folder) if source_folder is not None else None
    pooling = Pooling.from_folder(folder) if folder is not None and not has_head(model) else None
    unread = Calibration({name: (name,) for name in names}, {}, {}, "none")
    stored = stored_dtype(stored_tensors(folder)) if folder is not None else None
    work = _Work(model, tokenizer, sites, None, None, unread, pooling, folder, fingerprint(model), stored)
    if recipe.device is not None:
        model.to(recipe.device)  # type: ignore[arg-type]
    needs = frozenset().union(*(row.needs(planned=recipe.plan is not None) for row in rows))
    data = data if data is not None else recipe.data
    if not needs and data is None:
        return work
    with work.clock("data"):
        work.data, work.held = _data(model, tokenizer, data, recipe)
    if needs:
        with work.clock("calibration"):
            work.calibration = calibrate(
                model,
                names,
                work.data,
                needs=needs,
                curvature=recipe.curvature,
                seed=recipe.seed,
                pooling=pooling,
                may_fall_back=all(row.method.name == "eckart" for row in rows if "gradients" in row.needs()),
            )
    return work


def _data(
    model: PreTrainedModel, tokenizer: Any, data: Any, recipe: Recipe
) -> tuple[CalibrationData, CalibrationData | None]:
    """Batches to calibrate on, and others to measure on; N samples asked for are N that calibrate."""
    defaults: dict[Kind, int] = {"causal": 128}
    size = recipe.batch_size or 8
    wanted = recipe.num_samples or defaults.get(kind_of(model.config, model), 1024)
    batches = -(-wanted // size)
    extra = max(1, batches // 8)
    loaded = load_data(
        data,
        tokenizer=tokenizer,
        model=model,
        config=recipe.data_config,
        split=recipe.data_split,
        column=recipe.data_column,
        target_column=recipe.data_target_column,
        label_column=recipe.data_label_column,
        revision=recipe.data_revision,
        num_samples=wanted + extra * size,
        max_seq_length=recipe.max_seq_length,
        batch_size=size,
        seed=recipe.seed,
    )
    return hold_out(loaded, min(extra, len(loaded) // 9 or int(len(loaded) > 1)))


def _solve(work: _Work, settings: Settings) -> tuple[dict[str, Problem], dict[str, Factorisation]]:
    """Every rank's factors of every site that the data reached."""
    problems: dict[str, Problem] = {}
    solved: dict[str, Factorisation] = {}
    with work.clock("factorisation"):
        for site in progress(work.sites.chosen, what="factorising", total=len(work.sites.chosen)):
            moments = work.calibration.moments.get(site.name)
            if settings.method.needs and moments is None:
                continue
            weight = dense_weight(work.model.get_submodule(site.name))
            if moments is not None:
                moments.centred = settings.method.centred and site.has_bias
            problems[site.name] = settings.method.metric(weight, moments)  # type: ignore[arg-type]
            solved[site.name] = factorise(problems[site.name], site.name)
    if not solved:
        raise ModelError(
            "the calibration data reached none of the chosen sites; use text that runs through them, "
            "or a method that needs no data: --method svd."
        )
    return problems, solved


def _finish(
    work: _Work,
    settings: Settings,
    recipe: Recipe,
    problems: Mapping[str, Problem],
    solved: Mapping[str, Factorisation],
) -> Result:
    """Plan, put the factors in place, refit, measure, report."""
    sites, model, calibration = work.sites, work.model, work.calibration
    notes = list(calibration.notes)
    notes += [f"{name}: left dense, {reason}" for name, reason in calibration.unreached.items()]
    notes += [note for factors in solved.values() for note in factors.notes]
    budget = Budget.of_recipe(model, sites, recipe)
    plan = make_plan(sites, settings, recipe, calibration, problems, solved, budget, work.mark)
    with work.clock("replacement"):
        compressed = _put(work, plan, solved, recipe, notes)
    if settings.refit and work.data is not None:
        with work.clock("refit"):
            compressed = _refitted(work, settings, recipe, plan, compressed, notes)
    plan = with_changes(plan, choices=_as_stored(compressed, sites))
    if any(choice.form != DENSE for choice in plan.choices.values()):
        mark(compressed)
    with work.clock("measuring"):
        measured = quality(compressed, model, work.held, work.pooling) if work.held is not None else None
    names = [site.name for site in sites.chosen]
    report = reporting.make(
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        method=settings.method,
        form=" and ".join(sorted({c.form for c in plan.choices.values()} - {DENSE})) or DENSE,
        allocation=settings.allocation if recipe.plan is None else "plan",
        model=model,
        sites=sites,
        plan=plan,
        before=sizes(model, names, work.stored_dtype),
        after=sizes(compressed, names),
        unreached=calibration.unreached,
        curvature=calibration.curvature,
        data=work.data.description if work.data is not None else None,
        quality=measured,
        notes=notes,
        seconds=work.seconds,
        effective_ranks={name: factors.effective_rank for name, factors in solved.items()},
    )
    own_storage(compressed, model)
    return Result(compressed, plan, report, recipe, work.tokenizer, work.source_folder)


def _put(
    work: _Work, plan: Plan, solved: Mapping[str, Factorisation], recipe: Recipe, notes: list[str]
) -> PreTrainedModel:
    """A copy of the model with the planned forms in place, in the stored dtype."""
    compressed = shared_clone(work.model)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    if dtype is not None:
        cast(compressed, dtype)
    for site in work.sites.chosen:
        choice = plan.choices[site.name]
        if choice.form == DENSE:
            continue
        old: Any = work.model.get_submodule(site.name)
        weight = dense_weight(old)
        left, right = solved[site.name].truncated(choice.rank)
        bias = old.bias.detach() if site.has_bias else None
        moments = work.calibration.moments.get(site.name)
        if bias is not None and moments is not None and moments.centred:
            # The metric was the covariance: the mean's share of the error goes into the bias.
            bias = bias.double() + (weight.double() - left.double() @ right.double()) @ moments.inputs.mean
        module, fallback = store(site, choice.form, choice.rank, left, right, bias, dtype or weight.dtype)
        if fallback is not None:
            logger.warning(fallback)
            notes.append(fallback)
        replace(compressed, site.name, module)
    return compressed


def _refitted(
    work: _Work, settings: Settings, recipe: Recipe, plan: Plan, compressed: PreTrainedModel, notes: list[str]
) -> PreTrainedModel:
    """The model solved again on its own inputs, unless held-out text says that it was better before."""
    assert work.data is not None
    if work.held is None and not recipe.refit:
        notes.append("the refit was left out: there is too little text to hold some out and check it by")
        return compressed
    fitted = shared_clone(compressed)
    try:
        found = refit(
            work.model,
            fitted,
            work.sites.chosen,
            plan.choices,
            work.calibration.groups,
            work.calibration.moments,
            settings.method,
            work.data.batches,
            sorted(work.calibration.common),
        )
        if work.held is not None:
            before, after = (distance(quality(m, work.model, work.held, work.pooling)) for m in (compressed, fitted))
            if after > before:
                found = [f"held-out distance to the original {before:.4g} before it, {after:.4g} after"]
                fitted = compressed
    except NumericalError as error:
        found, fitted = [str(error)], compressed
    if fitted is compressed:
        found = [f"the refit was left out: {reason}" for reason in found]
    notes += found
    return fitted


def _as_stored(compressed: PreTrainedModel, sites: Sites) -> dict[str, Choice]:
    """The choices as they came out, fallbacks included."""
    choices: dict[str, Choice] = {}
    for site in sites.chosen:
        module: Any = compressed.get_submodule(site.name)
        choices[site.name] = Choice(module.form, module.rank) if hasattr(module, "form") else Choice(DENSE)
    return choices
