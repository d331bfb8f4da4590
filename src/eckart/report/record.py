"""The report of a compression: what was asked, done and measured, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from eckart.allocation import DENSE, Choice, Plan
from eckart.evaluation.sizes import Size, Sizes
from eckart.forms import form_named
from eckart.methods import Method
from eckart.model import Site, Sites

FORMAT_VERSION = 1


def build_report(
    *,
    recipe: Mapping[str, Any],
    method: Method,
    form: str,
    allocation: str,
    model: nn.Module,
    sites: Sites,
    plan: Plan,
    before: Sizes,
    after: Sizes,
    unreached: Mapping[str, str],
    curvature: str,
    data: Mapping[str, Any] | None,
    quality: Mapping[str, Any] | None,
    notes: list[str],
    seconds: Mapping[str, float],
    effective_ranks: Mapping[str, float],
    budget: int | None,
    ranks: Mapping[str, Any],
) -> dict[str, Any]:
    """Join the facts of a run. Sizes are counted from what is stored, not from what was planned.

    `kept.unused` is what the budget would have allowed: ranks that suit the target do not fill it exactly.
    """
    rows = []
    for site in sites.chosen:
        choice = plan.choices[site.name]
        rows.append(
            {
                "site": site.name,
                "kind": site.kind,
                "shape": list(site.shape),
                "form": choice.form,
                "rank": choice.rank if choice.form != DENSE else min(site.shape),
                "full_rank": _full_rank(choice, site),
                **({"block": list(choice.block)} if choice.block is not None else {}),
                **({"basis": choice.basis} if choice.basis is not None else {}),
                "before": before.modules[site.name].as_dict(),
                "after": _without_basis(after.modules[site.name], choice, site.in_features).as_dict(),
                **({"left_dense": unreached[site.name]} if site.name in unreached else {}),
                **({"effective_rank": round(effective_ranks[site.name], 2)} if site.name in effective_ranks else {}),
                **({"predicted_loss": plan.predicted[site.name]} if site.name in plan.predicted else {}),
                **({"reason": plan.reasons[site.name]} if site.name in plan.reasons else {}),
            }
        )
    matrices = sum(site.elements for site in sites.chosen)
    stored = sum(plan.choices[site.name].stored(*site.shape) for site in sites.chosen)
    unused = max(0, budget - stored) if budget is not None else None
    return {
        "format_version": FORMAT_VERSION,
        "model": type(model).__name__,
        "recipe": dict(recipe),
        "method": method.name,
        "paper": method.paper,
        "exact_for": method.exact_for,
        "form": form,
        "allocation": allocation,
        "curvature": curvature,
        "data": dict(data) if data is not None else None,
        "kept": {
            "of_sites": stored / matrices,
            "of_model": after.model.elements / before.model.elements,
            "matrix_elements_before": matrices,
            "matrix_elements_after": stored,
            **({"unused": unused} if unused is not None else {}),
        },
        "ranks": dict(ranks),
        "sizes": {
            "sites": {"before": before.named.as_dict(), "after": after.named.as_dict()},
            "model": {"before": before.model.as_dict(), "after": after.model.as_dict()},
        },
        "sites": rows,
        "skipped": dict(sites.skipped),
        "quality": dict(quality) if quality is not None else None,
        "notes": list(notes),
        "seconds": dict(seconds),
    }


def _full_rank(choice: Choice, site: Site) -> int:
    """What its rank would be if nothing was left out; of a layer that loses neurons, how many it had."""
    if choice.form == DENSE or form_named(choice.form).shared_by != "neurons":
        return min(site.shape)
    assert choice.block is not None
    return site.in_features if choice.basis is None else site.out_features // choice.block[0]


def _without_basis(size: Size, choice: Choice, in_features: int) -> Size:
    """What a site stores and computes itself: a basis that it shares counts once, in `sizes`, with a shared product."""
    if choice.basis is None:
        return size
    basis = form_named(choice.form).shared_elements(in_features, choice.rank)
    product = basis if form_named(choice.form).shared_by == "input" else 0
    return replace(
        size,
        elements=size.elements - basis,
        bytes=size.bytes - basis * size.bytes // size.elements,
        multiply_adds=size.multiply_adds - product,
    )
