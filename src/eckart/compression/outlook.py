"""What a run will do and about how long it takes, said before the long work begins.

Costs are in passes of the original over the calibration text. How many passes a stage takes was measured on models of 6
to 23 million parameters; what one takes here, a short timing of the model on its first batch says, and how long a
matrix is decomposed, that of one matrix.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from eckart.calibration.forward_context import forward_context
from eckart.calibration.layerwise import all_blocks
from eckart.compression import distil, refine
from eckart.compression.context import CompressionContext
from eckart.compression.factor_store import STAGE as FACTORS
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.compression.training_text import size_of, times_of_statistics
from eckart.data.inference import evaluating, forward
from eckart.moments import needs_backward
from eckart.progress import Outlook, Stage, describe_count, describe_seconds

logger = logging.getLogger(__name__)

GRAMS, GRADIENTS = 1.5, 4.0
"""Passes that gathering statistics takes, of inputs alone and of gradients as well."""

CURVES = 1.5
"""Passes that measuring curves takes: it reads as many rows as that allows."""

REFIT = 4.5
"""Passes of a refit: both models run, statistics are gathered again, and systems are solved."""

MEASURING = 3.0
"""Passes over the held-out text that one measuring takes: the original, the smaller model, the distance."""

SEARCH = 8
"""Models that a search for a loss or a speed makes."""

DECOMPOSITIONS, WITH_CURVES = 1.5, 4.0
"""Decompositions of a weight: of it and its metric; and where curves and shared factors are made as well."""

TIMING = 6.0
"""Seconds that taking a latency takes."""

LOADING = 10.0
"""Seconds in which a fresh process begins and reads a folder back."""

PROBE = 192
"""Rows and columns of the matrix that is decomposed to see how long that takes."""


def plan_stages(
    context: CompressionContext, settings: Settings, recipe: Recipe, *, published: bool = False, verified: bool = False
) -> list[Stage]:
    """The stages of a compression, with what each costs.

    Args:
        context: the model, its sites and its data.
        settings: method, form, allocation.
        recipe: what was asked.
        published: whether there is a folder to publish.
        verified: whether it is read back.
    """
    needs = settings.needs(planned=recipe.plan is not None)
    statistics = (GRADIENTS if needs_backward(needs) else GRAMS) if needs else 0.0
    measuring = MEASURING * _held_out(context)
    rounds, alone = recipe.rounds, not context.workspace.streaming and context.workspace.processes.size == 1
    stages = [Stage("statistics", rounds * statistics, turns=True)] if statistics else []
    stages.append(Stage("factors", seconds=rounds * _factoring_seconds(context, settings)))
    if settings.measures_curves:
        stages.append(Stage("curves", CURVES))
    if recipe.max_loss is not None or recipe.weighs_seconds:
        searched = recipe.max_loss is not None or recipe.speedup is not None
        timed = recipe.weighs_seconds and recipe.profile is None
        stages.append(Stage("plan", SEARCH * measuring * searched, 10 * TIMING * timed))
    if settings.refit and context.data is not None:
        stages.append(Stage("refit", rounds * (REFIT + 2 * measuring)))
    trainings = (
        ("refinement", settings.refines, context.refining, refine),
        ("distillation", settings.distils, context.distilling, distil),
    )
    for name, wanted, text, training in trainings:
        if wanted and text is not None:
            times = times_of_statistics(context, text, training.TRAINING.epochs, training.COST)
            stages.append(Stage(name, times * (statistics or GRAMS) + 2 * measuring))
    if recipe.quantize is not None:
        stages.append(Stage("rounding", 2 * measuring))
    if measuring and not {"refit", "refinement", "distillation", "rounding"} & {stage.name for stage in stages}:
        stages.append(Stage("quality", measuring))
    if recipe.latency and alone:
        stages.append(Stage("latency", seconds=TIMING))
    if published and measuring and alone:
        stages.append(Stage("rounded originals", 2 * measuring))
    if published:
        stages.append(Stage("publishing", seconds=LOADING * verified + 1))
    return stages


STAGE_OF = {
    "calibration": "statistics",
    "factorization": "factors",
    "planning": "plan",
    "quantization": "rounding",
    "measuring": "quality",
    "baselines": "rounded originals",
}
"""Steps of the timer by the names of stages, where they differ."""


def announce(
    context: CompressionContext,
    settings: Settings,
    recipe: Recipe,
    report: Callable[[str], None],
    *,
    published: bool = False,
    verified: bool = False,
) -> Outlook:
    """Say what a compression will do and about how long that takes.

    Args:
        context: the model, its sites and its data.
        settings: method, form, allocation.
        recipe: what was asked.
        report: is told.
        published: whether there is a folder to publish.
        verified: whether it is read back.

    Returns:
        The outlook, before its first stage.
    """
    stages = plan_stages(context, settings, recipe, published=published, verified=verified)
    outlook = Outlook(stages, report, time_pass(context))
    goal, numbers = describe_goal(recipe, settings), _sites(context)
    report(f"{settings.method.name}, {describe_forms(settings, recipe)}; {goal}; {numbers}")
    report(describe_text(context))
    report(describe_stages(outlook.stages, outlook.pass_seconds))
    if context.workspace.finished(FACTORS):
        report("an earlier run has done a part of it")
    if outlook.seconds is not None:
        report(f"{describe_seconds(outlook.seconds)} in all")
    return outlook


def announce_comparison(
    context: CompressionContext,
    rows: Sequence[Settings],
    keeps: Sequence[float],
    recipe: Recipe,
    report: Callable[[str], None],
) -> Outlook:
    """Say what a comparison will do and about how long that takes.

    Args:
        context: the model, its sites and its data.
        rows: settings of the methods.
        keeps: the sizes.
        recipe: all but method and size.
        report: is told.

    Returns:
        The outlook, before its first stage: the statistics, then a stage for each run.
    """
    asked = recipe.model_copy(update={"latency": recipe.latency is not False})
    shared, runs = 0.0, []
    for settings in rows:
        own = {stage.name: stage for stage in plan_stages(context, settings, asked)}
        shared = max(shared, own["statistics"].passes if "statistics" in own else 0.0)
        each = [stage for name, stage in own.items() if name not in ("statistics", "factors")]
        passes, seconds = (sum(getattr(stage, key) for stage in each) for key in ("passes", "seconds"))
        factoring = own["factors"].seconds
        for place, keep in enumerate(keeps):
            runs.append(Stage(name_run(settings, keep), passes, seconds + factoring * (place == 0)))
    measuring = MEASURING * _held_out(context)
    stages = [*([Stage("statistics", shared)] if shared else []), *runs]
    if measuring:
        stages.insert(len(stages) - len(runs) + 1, Stage("rounded originals", 2 * measuring))
    outlook = Outlook(stages, report, time_pass(context))
    methods, sizes = describe_count(len(rows), "method"), describe_count(len(keeps), "size")
    report(
        f"{describe_count(len(runs), 'run')}: {methods} at {sizes}; {_sites(context)}; the text is read and the "
        "statistics are gathered once"
    )
    report(describe_text(context))
    if outlook.seconds is not None:
        report(f"{describe_seconds(outlook.seconds)} in all")
    return outlook


def name_run(settings: Settings, keep: float) -> str:
    """The stage of one run of a comparison."""
    return f"{settings.method.name} at keep {keep:g}"


def describe_forms(settings: Settings, recipe: Recipe) -> str:
    """The forms that weights may take; which of them they took stands in the report."""
    if recipe.plan is not None:
        return "forms as planned"
    names = settings.candidates
    return f"form {names[0]}" if len(names) == 1 else f"forms to choose from: {' and '.join(sorted(names))}"


def describe_goal(recipe: Recipe, settings: Settings) -> str:
    """The size, loss or speed that was asked for."""
    if recipe.plan is not None:
        return f"the sizes of {recipe.plan}"
    if recipe.max_loss is not None:
        return f"the smallest size that loses no more than {recipe.max_loss}"
    if recipe.speedup is not None:
        return f"the size that is {recipe.speedup:g} times as fast"
    if settings.allocation == "paper":
        return "the sizes of its paper"
    return f"keep {recipe.keep:g} of the numbers"


def describe_text(context: CompressionContext) -> str:
    """How much is read."""
    if context.data is None:
        return "no text is read"
    examples = sum(len(batch) for batch in context.data.batches)
    held = sum(len(batch) for batch in context.held_out.batches) if context.held_out is not None else 0
    tokens = sum(batch.num_tokens for batch in context.data.batches)
    read = f"{describe_count(examples, 'sample')}{f' with {tokens:,} tokens' if tokens else ''}"
    return (
        f"{read} to calibrate on, {held:,} more to measure on; batches of "
        f"{max(len(batch) for batch in context.data.batches)}"
    )


def describe_stages(stages: Sequence[Stage], pass_seconds: float | None) -> str:
    """The stages, with what they cost as a multiple of the statistics; without statistics their names alone."""
    statistics = next((stage.passes for stage in stages if stage.name == "statistics"), 0.0)
    if not statistics:
        return f"stages: {', '.join(stage.name for stage in stages)}"

    def cost(stage: Stage) -> str:
        seconds = stage.passes * (pass_seconds or 0.0) + stage.seconds
        if stage.seconds and pass_seconds is None:
            return ""
        share = stage.passes / statistics if pass_seconds is None else seconds / (statistics * pass_seconds)
        return " <0.1" if share < 0.05 else f" {share:.1f}".removesuffix(".0")

    return f"stages, in times the statistics: {', '.join(stage.name + cost(stage) for stage in stages)}"


def time_pass(context: CompressionContext) -> float | None:
    """Seconds of a pass of the original over the calibration text, by its first batch; None where that is not tried.

    Of a model larger than memory a pass takes long: its first stage tells.
    """
    data = context.data
    if data is None or context.workspace.streaming:
        return None
    model, batch = context.model, data.batches[0]
    try:
        with forward_context(model, context.weights, all_blocks(model))(None), evaluating(model):
            forward(model, batch.rows(0, 1).inputs)  # the first call prepares what later ones use
            start = _now(context)
            forward(model, batch.inputs)
            seconds = _now(context) - start
    except Exception as error:  # the stage that needs a pass says so
        logger.info("a pass was not timed: %s", error)
        return None
    return seconds * size_of(data.batches) / size_of([batch]) / context.workspace.processes.size


def _now(context: CompressionContext) -> float:
    if context.weights.device.type == "cuda":
        torch.cuda.synchronize(context.weights.device)
    return time.perf_counter()


def _held_out(context: CompressionContext) -> float:
    """The held-out text as a part of the calibration text."""
    if context.held_out is None or context.data is None:
        return 0.0
    return size_of(context.held_out.batches) / size_of(context.data.batches)


def _factoring_seconds(context: CompressionContext, settings: Settings) -> float:
    """What factoring all sites takes, by the decomposition of one matrix."""
    sites = context.sites.chosen
    size = min(PROBE, max(min(site.shape) for site in sites))
    matrix = torch.eye(size, device=context.weights.device) + 1 / (
        1 + torch.arange(size, device=context.weights.device)
    )
    start = _now(context)
    torch.linalg.svd(matrix)
    seconds = _now(context) - start
    work = sum(min(site.shape) ** 2 * max(site.shape) for site in sites) / size**3
    each = WITH_CURVES if settings.allocation == "loss" else DECOMPOSITIONS
    return each * work * seconds / context.workspace.processes.size


def _sites(context: CompressionContext) -> str:
    numbers = sum(site.shape[0] * site.shape[1] for site in context.sites.chosen)
    return f"{describe_count(len(context.sites.chosen), 'weight')} with {numbers:,} numbers are factored"
