"""The only file that knows the order of a run:

recipe -> model -> sites -> moments -> problems -> curves -> plan -> factors in place -> measure -> publish.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace as with_changes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart import report as reporting
from eckart.allocate import DENSE, Choice, Curve, Plan, allocate, rank_steps, read_plan, stored_elements, uniform
from eckart.calibrate import Calibration, calibrate
from eckart.checkpoint.card import model_card
from eckart.checkpoint.fingerprint import fingerprint
from eckart.checkpoint.plugin import mark
from eckart.checkpoint.save import save
from eckart.data import CalibrationData, Pooling, kind_of, load as load_data
from eckart.data.inference import progress
from eckart.errors import ModelError, NumericalError, UsageError
from eckart.forms import form_named
from eckart.linalg import Factorisation, Problem, curve_under, factorise, require_finite
from eckart.measure import agreement, embedding_cosine, sizes
from eckart.methods import METHODS, Method, method_named
from eckart.model import Site, Sites, dense_weight, find_sites, replace, shared_clone, store
from eckart.recipe import Recipe, make_recipe
from eckart.recover import refit

logger = logging.getLogger(__name__)

# One held-out batch for every so many that calibrate, to measure agreement on text that was not fitted.
HELD_OUT_EVERY = 8


@dataclass
class Result:
    """What a run made.

    Attributes:
        model: the compressed model; the one that was passed in is as it was.
        plan: site -> form and rank.
        report: everything that was asked, done and measured, as JSON values.
        recipe: what was asked.
    """

    model: PreTrainedModel
    plan: Plan
    report: dict[str, Any]
    recipe: Recipe
    tokenizer: Any = None
    source_folder: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return reporting.as_text(self.report)

    def save_pretrained(self, output_dir: str | Path, *, overwrite: bool = False) -> Path:
        """Publish the whole folder at once: weights, tokenizer, card, recipe, plan and report.

        Raises:
            CheckpointError: if it cannot be published; then nothing is.
        """
        sentence = self.source_folder is not None and (self.source_folder / "modules.json").exists()
        card = model_card(
            Path(output_dir).name,
            base_model=self.recipe.model or getattr(self.model.config, "_name_or_path", None) or None,
            auto_class=_auto_class(self.model),
            library_name="sentence-transformers" if sentence else "transformers",
            method=self.report["method"],
            form=self.report["form"],
            measured=reporting.card_rows(self.report),
        )
        return save(
            self.model,
            output_dir,
            tokenizer=self.tokenizer,
            source_folder=self.source_folder,
            recipe_yaml=self.recipe.to_yaml(),
            plan=self.plan.to_json(),
            report=self.report,
            card=card,
            overwrite=overwrite,
        )


@dataclass(frozen=True)
class _Settings:
    """The recipe with the method's own settings filled in."""

    method: Method
    form: str
    allocation: str
    refit: bool


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
    recipe = _merged(recipe, data, method, options)
    asked = method_named(method) if method is not None else method_named(recipe.method)
    clock = _Clock()
    notes: list[str] = []
    sites = find_sites(model, recipe.targets, recipe.ignore)
    for site in sites.chosen:
        require_finite(dense_weight(model.get_submodule(site.name)), f"{site.name}.weight")
    budget = _budget(model, sites, recipe)
    settings = _settings(asked, recipe)
    folder = Path(source_folder) if source_folder is not None else None
    pooling = Pooling.from_folder(folder) if folder is not None and _is_bare(model) else None

    with clock("data"):
        calibration_data, held = _data(model, tokenizer, data if data is not None else recipe.data, recipe, settings)
    with clock("calibration"):
        settings, calibration = _calibrate(model, sites, calibration_data, settings, recipe, pooling, notes)
    with clock("factorisation"):
        problems, solved = _factorise(model, sites, settings, calibration, notes)
    plan = _plan(model, sites, settings, recipe, calibration, problems, solved, budget)
    with clock("replacement"):
        compressed = _put(model, sites, plan, solved, recipe, notes)
        if settings.refit and calibration_data is not None:
            refit(model, compressed, sites.chosen, plan.choices, calibration.groups, problems, calibration_data, notes)
    plan = with_changes(plan, choices=_as_stored(compressed, sites, plan))
    mark(compressed)
    with clock("measuring"):
        quality = _quality(model, compressed, held, pooling)
    report = reporting.make(
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        method=settings.method,
        form=settings.form,
        allocation=settings.allocation if recipe.plan is None else "plan",
        model=model,
        sites=sites,
        plan=plan,
        before=sizes(model, [site.name for site in sites.chosen]),
        after=sizes(compressed, [site.name for site in sites.chosen]),
        unreached=calibration.unreached,
        curvature=calibration.curvature,
        data=calibration_data.description if calibration_data is not None else None,
        quality=quality,
        notes=notes,
        seconds=clock.seconds,
        effective_ranks={name: factors.effective_rank for name, factors in solved.items()},
    )
    return Result(compressed, plan, report, recipe, tokenizer, folder)


def _merged(recipe: Recipe | None, data: Any, method: str | Method | None, options: Mapping[str, Any]) -> Recipe:
    content: dict[str, Any] = recipe.model_dump(exclude_unset=True) if recipe is not None else {}
    content.update(options)
    if isinstance(data, (str, Path)):
        content["data"] = str(data)
    if isinstance(method, str):
        content["method"] = method
    return make_recipe(content, "eckart.compress")


def _settings(method: Method, recipe: Recipe) -> _Settings:
    if recipe.metric is not None:
        other = METHODS[recipe.metric]
        method = with_changes(
            method, metric=other.metric, needs=other.needs, exact_for=other.exact_for, centred=other.centred
        )
    form = recipe.form or method.form
    allocation = recipe.allocation or method.allocation
    wants_refit = method.refit if recipe.refit is None else recipe.refit
    return _Settings(method, form, allocation, wants_refit)


def _budget(model: PreTrainedModel, sites: Sites, recipe: Recipe) -> int:
    """Elements that the sites' matrices may store."""
    inside = sum(site.elements for site in sites.chosen)
    if recipe.keep_of == "sites":
        return int(recipe.keep * inside)
    whole = sizes(model).model.elements
    budget = int(recipe.keep * whole) - (whole - inside)
    if budget <= 0:
        raise UsageError(
            f"--keep {recipe.keep:g} --keep-of model: {whole - inside} of the model's {whole} numbers are not in "
            f"eligible weights, so at least {(whole - inside) / whole:.4f} stays. Raise --keep, or use --keep-of sites."
        )
    return budget


def _data(
    model: PreTrainedModel, tokenizer: Any, data: Any, recipe: Recipe, settings: _Settings
) -> tuple[CalibrationData | None, CalibrationData | None]:
    """Batches to calibrate on, and others to measure on."""
    if data is None and not (settings.method.needs or settings.allocation == "loss" or settings.refit):
        return None, None
    kind_default = 128 if kind_of(model.config, model) == "causal" else 1024
    size = recipe.batch_size or 8
    wanted = recipe.num_samples or kind_default
    # Whole batches are held out, so that asking for N samples calibrates on N where there is text enough.
    extra = max(1, -(-wanted // size) // HELD_OUT_EVERY) * size
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
        num_samples=wanted + extra,
        max_seq_length=recipe.max_seq_length,
        batch_size=size,
        seed=recipe.seed,
    )
    spare = len(loaded) // (HELD_OUT_EVERY + 1) or int(len(loaded) > 1)
    return _hold_out(loaded, min(extra // size, spare))


def _hold_out(loaded: CalibrationData, count: int) -> tuple[CalibrationData, CalibrationData | None]:
    """Take `count` batches, evenly spaced, for measuring."""
    if count == 0:
        return loaded, None
    step = len(loaded) / count
    chosen = {int(step * (i + 0.5)) for i in range(count)}
    rest = [batch for i, batch in enumerate(loaded.batches) if i not in chosen]
    held = [batch for i, batch in enumerate(loaded.batches) if i in chosen]
    description = {**loaded.description, "calibration_examples": sum(len(b) for b in rest)}
    description["calibration_tokens"] = sum(b.num_tokens for b in rest)
    description["held_out_examples"] = sum(len(b) for b in held)
    return CalibrationData(rest, description), CalibrationData(held, {"held_out_of": loaded.description})


def _calibrate(
    model: PreTrainedModel,
    sites: Sites,
    data: CalibrationData | None,
    settings: _Settings,
    recipe: Recipe,
    pooling: Pooling | None,
    notes: list[str],
) -> tuple[_Settings, Calibration]:
    """Statistics; a model that cannot run backward gets the best that needs no gradients, with a word."""
    names = [site.name for site in sites.chosen]
    needs = settings.method.needs
    if settings.allocation == "loss" and recipe.plan is None:
        needs = needs | METHODS["kfac"].needs
    if data is None:
        return settings, Calibration({name: (name,) for name in names}, {}, {}, "none")
    arguments: dict[str, Any] = {"curvature": recipe.curvature, "seed": recipe.seed, "pooling": pooling}
    try:
        return settings, calibrate(model, names, data, needs=needs, **arguments)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        if not needs & {"gradients", "fisher"} or settings.method.name != "eckart":
            raise
        note = (
            f"no backward pass runs through {type(model).__name__} ({type(error).__name__}: {error}); "
            "fell back from the kfac metric and loss allocation to the drone metric and uniform ranks"
        )
        logger.warning(note)
        notes.append(note)
        drone = METHODS["drone"]
        method = with_changes(settings.method, metric=drone.metric, needs=drone.needs, exact_for=drone.exact_for)
        settings = with_changes(settings, method=method, allocation="uniform")
        return settings, calibrate(model, names, data, needs=method.needs, **arguments)


def _factorise(
    model: PreTrainedModel, sites: Sites, settings: _Settings, calibration: Calibration, notes: list[str]
) -> tuple[dict[str, Problem], dict[str, Factorisation]]:
    """Every rank's factors of every site that the data reached."""
    problems: dict[str, Problem] = {}
    solved: dict[str, Factorisation] = {}
    method = settings.method
    for site in progress(sites.chosen, what="factorising"):
        if method.needs and site.name not in calibration.moments:
            continue
        weight = dense_weight(model.get_submodule(site.name))
        moments = calibration.moments.get(site.name)
        problem = method.metric(weight, moments) if moments is not None else method.metric(weight, None)  # type: ignore[arg-type]
        problems[site.name] = problem
        solved[site.name] = factorise(problem, site.name)
        notes.extend(solved[site.name].notes)
    for name, reason in calibration.unreached.items():
        notes.append(f"{name}: left dense, {reason}")
        solved.pop(name, None)
    if not solved:
        raise ModelError(
            "the calibration data reached none of the chosen sites; use text that runs through them, "
            "or a method that needs no data: --method svd."
        )
    return problems, solved


def _plan(
    model: PreTrainedModel,
    sites: Sites,
    settings: _Settings,
    recipe: Recipe,
    calibration: Calibration,
    problems: Mapping[str, Problem],
    solved: Mapping[str, Factorisation],
    budget: int,
) -> Plan:
    shapes = {site.name: site.shape for site in sites.chosen}
    mark = fingerprint(model)
    if recipe.plan is not None:
        plan = read_plan(Path(recipe.plan), shapes)
        if plan.model and plan.model != mark:
            raise UsageError(
                f"--plan {recipe.plan}: it was made for another model ({plan.model[:12]}, this one is {mark[:12]}). "
                "Make a plan for this model, or remove the entry 'model' to use it all the same."
            )
        missing = [n for n, c in plan.choices.items() if c.form != DENSE and n not in solved]
        if missing:
            raise UsageError(
                f"--plan {recipe.plan}: site {missing[0]} cannot be factored: "
                f'{calibration.unreached.get(missing[0], "no statistics")}. Set its form to "dense".'
            )
        return with_changes(plan, model=mark)
    reached = {name: shape for name, shape in shapes.items() if name in solved}
    fixed = sum(site.elements for site in sites.chosen if site.name not in reached)
    if settings.allocation == "uniform":
        inside = sum(rows * columns for rows, columns in reached.values())
        keep = recipe.keep if recipe.keep_of == "sites" else (budget - fixed) / inside
        choices = uniform(reached, keep, settings.form, multiple=recipe.rank_multiple or 1)
        predicted: dict[str, float] = {}
    else:
        curves = {
            site.name: _curve(site, settings, recipe, calibration, problems[site.name], solved[site.name])
            for site in sites.chosen
            if site.name in reached
        }
        choices = allocate(curves, budget - fixed)
        predicted = {name: curve.losses[list(curve.choices).index(choices[name])] for name, curve in curves.items()}
    for name in shapes:
        choices.setdefault(name, Choice(DENSE))
    choices = {name: choices[name] for name in shapes}
    return Plan(choices, mark, predicted)


def _curve(
    site: Site,
    settings: _Settings,
    recipe: Recipe,
    calibration: Calibration,
    problem: Problem,
    solved: Factorisation,
) -> Curve:
    """What the site can be and the loss that each option is predicted to cost, per sequence.

    `1/2 (n_site / n_sequences) || H^(1/2) D G^(1/2) ||^2`, n_site the tokens that reached the site, D the change
    of the weight: the second-order change of the loss under the Kronecker-factored Fisher matrix.
    """
    moments = calibration.moments[site.name]
    kfac = METHODS["kfac"]
    if {"gram", "gradients"} <= settings.method.needs:
        errors = solved.curve
    else:
        errors = curve_under(solved, kfac.metric(problem.target, moments))
    scale = 0.5 * moments.inputs.count / max(moments.sequences, 1)
    form = form_named(settings.form)
    rows, columns = site.shape
    multiple = recipe.rank_multiple or default_multiple(site.shape)
    ranks = rank_steps(form.max_rank(rows, columns), multiple)
    choices = [Choice(settings.form, rank) for rank in ranks] + [Choice(DENSE)]
    stored = [choice.stored(rows, columns) for choice in choices]
    losses = [float(scale * errors[rank]) for rank in ranks] + [0.0]
    return Curve(choices, stored, losses)


def default_multiple(shape: tuple[int, int]) -> int:
    """Ranks in multiples of 8 for hardware's sake, finer where a weight is small."""
    multiple = 8
    while multiple > 1 and min(shape) < 64 * multiple:
        multiple //= 2
    return multiple


def _put(
    model: PreTrainedModel,
    sites: Sites,
    plan: Plan,
    solved: Mapping[str, Factorisation],
    recipe: Recipe,
    notes: list[str],
) -> PreTrainedModel:
    """A copy of the model with the planned forms in place, in the stored dtype."""
    compressed = shared_clone(model)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    if dtype is not None:
        compressed.to(dtype)
    for site in sites.chosen:
        choice = plan.choices[site.name]
        if choice.form == DENSE:
            continue
        old = model.get_submodule(site.name)
        left, right = solved[site.name].truncated(choice.rank)
        bias = old.bias.detach() if site.has_bias else None
        module, fallback = store(site, choice.form, choice.rank, left, right, bias, dtype or dense_weight(old).dtype)
        if fallback is not None:
            logger.warning(fallback)
            notes.append(fallback)
        replace(compressed, site.name, module)
    return compressed


def _as_stored(compressed: PreTrainedModel, sites: Sites, plan: Plan) -> dict[str, Choice]:
    """The choices as they came out, fallbacks included."""
    choices: dict[str, Choice] = {}
    for site in sites.chosen:
        module: Any = compressed.get_submodule(site.name)
        choices[site.name] = Choice(module.form, module.rank) if hasattr(module, "form") else Choice(DENSE)
    return choices


def _quality(
    model: PreTrainedModel,
    compressed: PreTrainedModel,
    held: CalibrationData | None,
    pooling: Pooling | None,
) -> dict[str, Any] | None:
    """Agreement with the original on held-out batches of the same data."""
    if held is None:
        return None
    if _is_bare(model):
        measured = {"embedding": embedding_cosine(compressed, model, held, pooling)}
    else:
        measured = {"agreement": agreement(compressed, model, held)}
    for values in measured.values():
        if not all(bool(torch.isfinite(torch.tensor(v))) for v in values.values() if isinstance(v, float)):
            raise NumericalError(
                f"the compressed model's output is not finite on held-out text ({values}). Nothing was published: "
                "store in float32 with --dtype float32, or raise --keep."
            )
    return {**measured, "examples": held.num_examples, "tokens": held.num_tokens}


def _is_bare(model: PreTrainedModel) -> bool:
    """A model without a head: its output is features."""
    return (
        getattr(model, "base_model", None) is model
        and not hasattr(model, "lm_head")
        and (model.get_output_embeddings() is None)
    )


def _auto_class(model: PreTrainedModel) -> str:
    name = type(model).__name__
    for ending in (
        "ForCausalLM",
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
        "ForImageClassification",
    ):
        if name.endswith(ending):
            return "AutoModel" + ending
    if name.endswith("LMHeadModel"):
        return "AutoModelForCausalLM"
    if name.endswith("ForConditionalGeneration"):
        return "AutoModelForSeq2SeqLM"
    return "AutoModel"


class _Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 3)
