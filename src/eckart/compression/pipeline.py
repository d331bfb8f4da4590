"""The order of a compression. Each step is one call, documented in the file of its name beside this one.

recipe -> model -> sites -> data -> (statistics -> factors), window by window -> plan -> forms in place -> embeddings
-> refit -> refinement -> distillation -> rounding -> quality -> report -> published folder

A site is a weight that can be factored; a window is a group of sites whose statistics are in memory at the same time.
What users choose by name is one file each: methods in `eckart.methods`, forms in `eckart.forms`, statistics in
`eckart.moments`, recoveries in `eckart.recovery`; `eckart.registry` lists them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eckart.calibration import note_few_tokens
from eckart.calibration.layerwise import StatisticsWindow
from eckart.checkpoint.description import attach_config, is_special
from eckart.compression.announce_training import announce_training
from eckart.compression.assemble import Assembly, set_lean
from eckart.compression.baselines import measure_baselines
from eckart.compression.choose_plan import PlanChoice
from eckart.compression.context import CompressionContext
from eckart.compression.distil import distil_if_better
from eckart.compression.embeddings import factor_embeddings
from eckart.compression.factor_store import FactorStore
from eckart.compression.factorize import factorize_sites
from eckart.compression.measure import measure_quality, time_models
from eckart.compression.neuron_layers import make_stock
from eckart.compression.open_run import keep_unchanged, open_run
from eckart.compression.options import combine_options, dtype_of
from eckart.compression.outlook import STAGE_OF, announce
from eckart.compression.plan_builder import Solved, stored_choices
from eckart.compression.prepare import prepare
from eckart.compression.recipe import Recipe
from eckart.compression.refine import refine_if_better
from eckart.compression.refit import refit_if_better
from eckart.compression.report_builder import build_report
from eckart.compression.result import Result
from eckart.compression.rounding import round_compressed
from eckart.compression.rounds import go_through_rounds
from eckart.compression.settings import Settings
from eckart.compression.stages import Stages
from eckart.compression.workspace import Workspace
from eckart.config import refuse_fallbacks
from eckart.evaluation.sizes import count_sizes
from eckart.methods import Method, method_named
from eckart.model import fuse_experts, unshare_storage
from eckart.quantization import require_torchao

logger = logging.getLogger(__name__)


def compress(
    model: PreTrainedModel | str | Path | None = None,
    tokenizer: Any = None,
    *,
    data: Any = None,
    method: str | Method | None = None,
    form: str | type | None = None,
    recipe: Recipe | None = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    inputs: Sequence[str | Path | None] = (),
    source_folder: str | Path | None = None,
    workspace: Workspace | None = None,
    verify: bool = False,
    report_progress: Callable[[str], None] = logger.info,
    **options: Any,
) -> Result:
    """Factor the weights of a model, and publish the smaller model where an output folder is given.

    A model in memory stays as it is: its numbers, configuration, device, training mode, `requires_grad`, and the global
    random state. A folder is worked on as a whole or, where it is too large for memory and `output_dir` is given, block
    by block; repeating the call then resumes an interrupted run. Under a launcher that starts several processes
    (torchrun), the text and the sites are divided among them, and the first one publishes.

    Args:
        model: a transformers model in any floating-point type, or the folder or hub name of one.
        tokenizer: needed where a model in memory is calibrated on text.
        data: to calibrate on: a file, folder, hub data set, "stdlib", "self", a list of strings, or batches.
        method: the name of a method, or a :class:`eckart.Method` of your own.
        form: the name of a stored form, or a class of your own on :class:`eckart.FactoredLinear`.
        recipe: all other options in one object; keyword options override it.
        output_dir: the folder to publish. It is published whole, or not at all.
        overwrite: replace an output that is there and holds only what eckart has published.
        restart: discard an unfinished run on the same output.
        inputs: other files that were read, such as that of the recipe; the output never replaces them.
        source_folder: where a model in memory came from: its other files are published too, and how it pools tokens
            into an embedding is read there.
        workspace: where to compute and to keep intermediate results; chosen by default.
        verify: let a fresh process read the folder back, and compare, before it is published.
        report_progress: called with a line on how the model is worked on and what that takes.
        **options: fields of :class:`eckart.Recipe`, such as `keep=0.5` or `targets=["*.mlp.*"]`.

    Returns:
        The compressed model with its plan and report; `folder` is the published folder.

    Raises:
        EckartError: naming what failed, where, and what to do; nothing is published then.
    """
    # 1. The options: what the recipe says, and the method where the recipe says nothing.
    recipe = combine_options(recipe, options, model=model, data=data, method=method, form=form)
    settings = Settings.of(method_named(recipe.method), recipe)
    if recipe.quantize is not None:
        require_torchao()

    # 2. The model, with a locked output folder and the journal of an interrupted run where there is an output.
    with keep_unchanged(model), open_run(
        model, tokenizer, data, recipe, [settings],
        output_dir=output_dir, overwrite=overwrite, restart=restart, inputs=inputs, source_folder=source_folder,
        workspace=workspace, verify=verify, report_progress=report_progress,
    ) as run:  # fmt: skip
        # 3. Its sites, the calibration data, and the way to the statistics. (`compare` passes several settings.)
        context = prepare(run, data, [settings], [recipe.keep])
        settings = context.adapt_settings(settings)
        settings = announce_training(context, settings, recipe, report_progress)

        outlook = announce(
            context, settings, recipe, report_progress, published=output_dir is not None, verified=verify
        )
        context.timer.enter = lambda step: outlook.enter(STAGE_OF.get(step, step))

        # 4. The factors of every site; 5. to 13. the smaller model made of them; 14. the published folder.
        largest = recipe.keep if recipe.max_loss is None else 1.0  # the size that keeps to it is not known yet

        def make_model(earlier: Recipe) -> Result:
            own = replace(settings, measures_curves=False, refines=False, distils=False)
            return build_model(context, own, earlier, make_factors(context, own, earlier, earlier.keep))

        with outlook:
            rounds = go_through_rounds(context, settings, run.recipe, make_model)
            factors = make_factors(context, settings, run.recipe, largest)
            refuse_fallbacks(context.known_notes(settings, factors.summary, recipe), strict=recipe.strict)
            result = build_model(context, settings, run.recipe, factors)
            refuse_fallbacks(result.report["notes"], strict=recipe.strict)
            if output_dir is not None:  # for the picture in its report
                with context.timer.step("baselines"):
                    baselines = measure_baselines(context)
                if baselines:
                    result.report |= {"baselines": baselines, "seconds": context.timer.seconds}
            result.report.update({"rounds": rounds} if rounds else {})
            outlook.enter("publishing")
            return run.publish(result)


def make_factors(
    context: CompressionContext,
    settings: Settings,
    recipe: Recipe,
    largest_keep: float,
    windows: Sequence[StatisticsWindow] | None = None,
) -> FactorStore:
    """Gather statistics and factor the sites that received tokens, one window after another.

    Each site is factored up to the largest rank that a plan may choose; windows that an interrupted run has finished
    are read from the store.

    Args:
        context: the model, its sites and their statistics.
        settings: method, form, allocation.
        recipe: plan file and budget.
        largest_keep: the largest `keep` that these factors will serve.
        windows: statistics that were gathered before, for several methods; if None they are gathered here.
    """
    factors = FactorStore(context.workspace.store, context.workspace.processes, context.weights.device)
    with context.timer.factorizing():
        factorize_sites(context, settings, recipe, largest_keep, factors, windows)
    factors.require_any()
    for note in note_few_tokens(factors.summary.seen):
        logger.warning(note)
    return factors


def build_model(context: CompressionContext, settings: Settings, recipe: Recipe, factors: FactorStore) -> Result:
    """Make the smaller model of the factors."""
    model, sites, timer = context.model, context.sites, context.timer
    summary, dtype = factors.summary, dtype_of(recipe)
    dense = context.dense_sites(summary)
    notes = context.known_notes(settings, summary, recipe)

    # 5. The plan: form and rank of every site, within the budget, or as fast or as good as was asked for.
    solved = Solved(summary.losses, dense, context.bases(settings, recipe), summary.joint, summary.sliced)
    choice = PlanChoice(context, settings, recipe, solved, factors)
    with timer.step("planning", noted=choice.measures):
        plan = choice.choose()
    notes += choice.notes

    # 6. Forms in place of the dense weights, in a copy of the model.
    assembly = Assembly(model, sites.chosen, context.weights, context.workspace, dtype)
    with timer.step("replacement"):
        compressed, fallbacks = assembly.put_forms(plan, factors)
    notes += fallbacks

    # 7. Factored token embeddings, where they were asked for.
    with timer.step("embeddings", noted=recipe.embeddings != "dense"):
        embedded = factor_embeddings(
            model, compressed, recipe, context.data, context.weights, context.workspace.processes, dtype
        )
    notes += embedded.notes

    # 8. The refit, kept if held-out text says that it is better.
    measured, stages = None, Stages()
    if settings.refit and context.data is not None:
        compressed, measured, refit_notes = refit_if_better(
            context, settings, recipe, plan, compressed, assembly, factors, stages
        )
        notes += refit_notes

    # 9. The blocks trained one after another, where that was asked for and is better.
    if settings.refines:
        compressed, measured, refine_notes = refine_if_better(
            context, recipe.seed, compressed, assembly, measured, stages
        )
        notes += refine_notes

    # 10. The same of all of them together.
    if settings.distils:
        compressed, measured, distil_notes = distil_if_better(context, recipe.seed, compressed, measured, stages)
        notes += distil_notes

    # 11. Weights in few bits, where they were asked for.
    rounding = None
    if recipe.quantize is not None:
        with timer.step("quantization"):
            measured, rounding, rounding_notes = round_compressed(context, compressed, recipe.quantize, measured)
        notes += rounding_notes

    # 12. The description of what is stored, and the quality on held-out text.
    plan = replace(plan, choices=stored_choices(compressed, sites, plan))
    after = count_sizes(compressed, context.names)  # before experts are fused again
    if recipe.stock:
        make_stock(compressed, context.neuron_layers(settings, recipe), plan.choices)
    fuse_experts(compressed)
    if is_special(compressed):
        attach_config(compressed)
    with timer.step("measuring"):
        if context.held_out is not None and measured is None:
            measured = measure_quality(context, compressed) or None
    notes += [context.unmeasured] if context.unmeasured is not None else []

    # 13. The report; the result has tensors of its own, and may use working memory.
    set_lean(compressed, False)
    with timer.step("latency", noted=bool(recipe.latency)):
        latency = time_models(context, compressed) if recipe.latency else None
    report = build_report(context, settings, recipe, plan, dense, measured, notes, summary, after)
    embedded.add_to(report)
    report |= {"latency": latency} if latency is not None else {}
    report |= {"quantization": rounding} if rounding is not None else {}
    if stages.found:
        report["stages"] = stages.found
    if choice.found:
        report["found"] = choice.found
    if choice.curves:
        report["curves"] = choice.curves
    if not context.workspace.streaming:
        unshare_storage(compressed, model)
    return Result(compressed, plan, report, recipe, context.tokenizer, context.source_folder)
