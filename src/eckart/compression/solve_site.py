"""Factor one site, or a group that shares a basis, from its statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.allocation import Choice
from eckart.compression.curves import Losses
from eckart.compression.settings import Settings
from eckart.forms import Block, form_named
from eckart.linalg import Factorization
from eckart.model import Site
from eckart.moments import Moments


@dataclass(frozen=True)
class SiteFactors:
    """The factors of a site up to its largest possible rank, and what later steps need of its statistics.

    Attributes:
        factors: for each shape of block (None alone, for a form without) up to the largest rank that may be asked for;
            none of a site that is never factored.
        losses: predicted change of the loss at rank 0 .. r, or the error in the method's own metric where it chooses
            among several shapes of block; None where nothing is chosen by it.
        mean: (n,) E[x], where the bias absorbs it.
        moments: the statistics without those of the inputs, where the site will be refitted.
    """

    factors: Mapping[Block | None, Factorization]
    losses: Losses | None = None
    mean: Tensor | None = None
    moments: Moments | None = None

    @property
    def effective_rank(self) -> float | None:
        """The effective rank under the metric, of the first factorization; None where there is none."""
        return next((found.effective_rank for found in self.factors.values()), None)

    @property
    def notes(self) -> list[str]:
        """Fallbacks; where there are several factorizations, only those of the chosen one are reported, later."""
        return [note for found in self.factors.values() for note in found.notes] if len(self.factors) == 1 else []

    def serialize(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return named tensors and JSON values, as a store keeps them."""
        tensors: dict[str, Tensor] = {}
        for place, (block, found) in enumerate(self.factors.items()):
            left, right = found.seen_factors
            own = {"left": left, "right": right, "squared": found.squared}
            if self.losses is not None:
                own["losses"] = self.losses[block]
            tensors |= {f"{place}.{key}": value for key, value in own.items()}
        if self.mean is not None:
            tensors["mean"] = self.mean
        if self.moments is not None:
            tensors |= {f"moments.{key}": value for key, value in self.moments.state().items()}
        return tensors, {
            "blocks": [None if block is None else list(block) for block in self.factors],
            "notes": [list(found.notes) for found in self.factors.values()],
        }

    @classmethod
    def deserialize(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> SiteFactors:
        """Rebuild the factors from what :meth:`serialize` returned."""
        state = {k.removeprefix("moments."): v for k, v in tensors.items() if k.startswith("moments.")}
        blocks: list[Block | None] = [None if b is None else (b[0], b[1]) for b in content["blocks"]]
        factors = {
            block: Factorization(
                (tensors[f"{place}.left"], tensors[f"{place}.right"]), tensors[f"{place}.squared"], tuple(notes)
            )
            for place, (block, notes) in enumerate(zip(blocks, content["notes"], strict=True))
        }
        losses = {block: tensors[key] for i, block in enumerate(blocks) if (key := f"{i}.losses") in tensors}
        return cls(factors, losses or None, tensors.get("mean"), Moments.from_state(state) if state else None)


def solve_site(
    site: Site, weight: Tensor, moments: Moments | None, settings: Settings, limits: Sequence[Choice], *, curve: bool
) -> SiteFactors:
    """Factor one site.

    Args:
        site: what it is.
        weight: (out, in).
        moments: its statistics, if the method reads any.
        settings: method, form, allocation, refit.
        limits: the largest choices that may be made, one for each shape of block.
        curve: whether the predicted loss of every rank is wanted.

    Returns:
        Its factors, and its curve where ranks are allocated by it.
    """
    if moments is not None:
        moments.centered = settings.method.centered and site.has_bias
    problem = settings.method.metric(weight, moments)  # type: ignore[arg-type]
    factors: dict[Block | None, Factorization] = {}
    losses: dict[Block | None, Tensor] = {}
    for largest in limits:
        form, block = form_named(largest.form), largest.block
        solved = form.solve(problem, block, largest.rank, site.name)
        if curve and moments is not None:
            losses[block] = _losses(solved, largest, problem.target, moments, settings)
        elif len(limits) > 1:
            losses[block] = solved.curve
        factors[block] = solved.kept(largest.rank)
        del solved
    del problem
    kept = None
    if settings.refit and moments is not None:
        kept = moments.with_statistics(moments.own)
    mean = moments.mean if moments is not None and moments.centered else None
    return SiteFactors(factors, losses or None, mean, kept)


def solve_group(
    names: Sequence[str], weights: Sequence[Tensor], moments: Sequence[Moments], settings: Settings, largest: Choice
) -> dict[str, SiteFactors]:
    """Factor weights of several layers on one basis, under the sum of their input statistics.

    Args:
        names: of the sites.
        weights: (out, in) of each.
        moments: of each; none of them where the method reads none.
        settings: the method.
        largest: the form that they share in, and the largest rank that may be asked for.

    Returns:
        Site -> its factors; the right one is the same for all.
    """
    problem = settings.method.metric(torch.cat(list(weights)), _summed(moments))  # type: ignore[arg-type]
    heights = [len(weight) for weight in weights]
    found = form_named(largest.form).solve_group(problem, heights, largest.rank, " and ".join(names))
    return {name: SiteFactors({None: factors}) for name, factors in zip(names, found, strict=True)}


def _summed(moments: Sequence[Moments]) -> Moments | None:
    """Sum the input statistics of several sites; the given ones are not changed."""
    if not moments:
        return None
    total = Moments.empty(moments[0].shared)
    total.sequences = moments[0].sequences
    for name, statistic in total.statistics.items():
        for entry in moments:
            statistic.merge(entry[name])
    return total


def _losses(factors: Factorization, largest: Choice, target: Tensor, moments: Moments, settings: Settings) -> Tensor:
    """Predicted change of the loss per sequence at every rank.

    `1/2 (n_site / n_sequences) || H^(1/2) D G^(1/2) ||^2`, n_site the tokens that reached the site, D the change
    of the weight: the second-order change of the loss under the Kronecker-factored Fisher matrix.
    """
    metric = settings.loss_metric
    if settings.method.metric is metric:
        errors = factors.curve
    else:
        problem = metric(target, moments)
        errors = form_named(largest.form).errors_under(factors, problem, largest.block, largest.rank)
    scale = 0.5 * moments.tokens / max(moments.sequences, 1)
    return (scale * errors).to(torch.float64)
