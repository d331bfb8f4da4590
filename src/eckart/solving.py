"""From a site's statistics to its factors: what a run keeps of a site when its statistics are gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eckart.linalg import Factorisation, curve_under, factorise
from eckart.methods import METHODS
from eckart.model import Site
from eckart.moments import Moments
from eckart.planning import Settings


@dataclass(frozen=True)
class Solved:
    """Factors of a site for every rank that it may get, and what later steps ask of it.

    Attributes:
        factors: up to the largest rank that may be asked for.
        losses: (r + 1,) predicted change of the loss at rank 0 .. r, float64; None where ranks are uniform.
        mean: (n,) E[x], where the bias absorbs it.
        moments: the statistics without those of the inputs, where the site will be refitted.
    """

    factors: Factorisation
    losses: Tensor | None = None
    mean: Tensor | None = None
    moments: Moments | None = None

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named tensors and JSON values."""
        left, right = self.factors.seen_factors
        tensors = {"left": left, "right": right, "squared": self.factors.squared}
        if self.losses is not None:
            tensors["losses"] = self.losses
        if self.mean is not None:
            tensors["mean"] = self.mean
        if self.moments is not None:
            tensors |= {f"moments.{key}": value for key, value in self.moments.state().items()}
        return tensors, {"notes": list(self.factors.notes)}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Solved:
        """What :meth:`pack` took apart."""
        state = {k.removeprefix("moments."): v for k, v in tensors.items() if k.startswith("moments.")}
        return cls(
            Factorisation((tensors["left"], tensors["right"]), tensors["squared"], tuple(content["notes"])),
            tensors.get("losses"),
            tensors.get("mean"),
            Moments.from_state(state) if state else None,
        )


def solve(
    site: Site, weight: Tensor, moments: Moments | None, settings: Settings, limit: int, *, curve: bool
) -> Solved:
    """Factor one site.

    Args:
        site: what it is.
        weight: (out, in).
        moments: its statistics, if the method reads any.
        settings: method, form, allocation, refit.
        limit: the largest rank that may be asked for.
        curve: whether the predicted loss of every rank is wanted.

    Returns:
        Its factors, and its curve where ranks are allocated by it.
    """
    if moments is not None:
        moments.centred = settings.method.centred and site.has_bias
    problem = settings.method.metric(weight, moments)  # type: ignore[arg-type]
    factors = factorise(problem, site.name)
    losses = None
    if curve and moments is not None:
        losses = _losses(factors, problem.target, moments, settings)
    del problem
    kept = None
    if settings.refit and moments is not None:
        kept = replace(moments, inputs=moments.inputs.without_gram())
    mean = moments.inputs.mean if moments is not None and moments.centred else None
    return Solved(factors.kept(limit), losses, mean, kept)


def _losses(factors: Factorisation, target: Tensor, moments: Moments, settings: Settings) -> Tensor:
    """Predicted change of the loss per sequence at every rank.

    `1/2 (n_site / n_sequences) || H^(1/2) D G^(1/2) ||^2`, n_site the tokens that reached the site, D the change
    of the weight: the second-order change of the loss under the Kronecker-factored Fisher matrix.
    """
    kfac = METHODS["kfac"]
    if settings.method.metric is kfac.metric:
        errors = factors.curve
    else:
        errors = curve_under(factors, kfac.metric(target, moments))
    scale = 0.5 * moments.inputs.count / max(moments.sequences, 1)
    return (scale * errors).to(torch.float64)
