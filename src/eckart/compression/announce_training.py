"""Which training a run will do, said before the long work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from eckart.compression.context import CompressionContext
from eckart.compression.distil import LEFT_OUT as NOT_DISTILLED
from eckart.compression.distil import plan_distillation
from eckart.compression.recipe import Recipe
from eckart.compression.refine import LEFT_OUT as NOT_REFINED
from eckart.compression.refine import plan_refinement
from eckart.compression.settings import Settings
from eckart.errors import UsageError


def announce_training(
    context: CompressionContext, settings: Settings, recipe: Recipe, report_progress: Callable[[str], None]
) -> Settings:
    """Say what the training of the smaller model will take, where there is to be one.

    Returns:
        The settings without a stage that cannot be and was not asked for by its own option, and without a refinement
        that a distillation takes the place of.

    Raises:
        UsageError: a stage was asked for by its own option and cannot be.
    """
    distils, refines, notes = settings.distils, settings.refines, list(settings.notes)
    if distils:
        why = _announce(context, plan_distillation, "--distil: ", recipe.distil, report_progress)
        distils = why is None
        refines = refines and not (distils and settings.trains_once)
        notes += [f"{NOT_DISTILLED}: {why}"] if not distils else []
    if refines:
        why = _announce(context, plan_refinement, "--refine: ", recipe.refine, report_progress)
        refines = why is None
        notes += [f"{NOT_REFINED}: {why}"] if not refines else []
    if refines and settings.distils and not distils:
        notes[-1] += "; the blocks are trained one after another instead"
    return replace(settings, distils=distils, refines=refines, notes=tuple(notes))


def _announce(
    context: CompressionContext,
    plan: Callable[[CompressionContext], str],
    flag: str,
    asked: bool | None,
    report_progress: Callable[[str], None],
) -> str | None:
    """Say what a stage will take. Why it cannot be, where that is so and it was not asked for by its option."""
    try:
        report_progress(plan(context))
    except UsageError as error:
        if asked:
            raise
        return str(error).removeprefix(flag).split(". ")[0]
    return None
