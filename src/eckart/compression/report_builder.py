"""Collect what a compression did for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eckart.allocation import DENSE, Plan
from eckart.compression.budget import Budget
from eckart.compression.context import CompressionContext
from eckart.compression.factor_store import FactorSummary
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.evaluation.sizes import Sizes, count_sizes
from eckart.report import record


def build_report(
    context: CompressionContext,
    settings: Settings,
    recipe: Recipe,
    plan: Plan,
    dense: Mapping[str, str],
    measured: Mapping[str, Any] | None,
    notes: Sequence[str],
    factors: FactorSummary,
    after: Sizes,
) -> dict[str, Any]:
    """What was asked, done and measured, as JSON values."""
    calibration, data = context.calibration, context.data
    report = record.build_report(
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        method=settings.method,
        form=" and ".join(sorted({c.form for c in plan.choices.values()} - {DENSE})) or DENSE,
        allocation=settings.allocation if recipe.plan is None else "plan",
        model=context.model,
        sites=context.sites,
        plan=plan,
        before=count_sizes(context.model, context.names, context.dtype_on_disk),
        after=after,
        unreached=dense,
        curvature=calibration.curvature,
        data=data.description if data is not None else None,
        quality=measured,
        notes=[*context.warnings, *notes],
        seconds=context.timer.seconds,
        effective_ranks=factors.effective_ranks,
        budget=_budget(context, settings, recipe, dense),
        ranks=_ranks(context, recipe),
    )
    return report | {"calibrated": calibration.how}


def _budget(context: CompressionContext, settings: Settings, recipe: Recipe, dense: Mapping[str, str]) -> int | None:
    """What all sites together might store; None where no size was asked for."""
    if recipe.plan is not None or settings.allocation == "paper" or recipe.speedup is not None or recipe.max_loss:
        return None
    left = sum(site.elements for site in context.sites.chosen if site.name in dense)
    return Budget.of_recipe(context.model, context.sites, recipe).leaving_out(left).elements


def _ranks(context: CompressionContext, recipe: Recipe) -> dict[str, Any]:
    """What ranks are multiples of, and where the model is to run."""
    if recipe.plan is not None:
        return {}
    multiples = context.multiples(recipe)
    largest = max((site.shape for site in context.sites.chosen), key=min)
    return {"target": multiples.target, "multiple": multiples.of(largest, "lowrank")}
