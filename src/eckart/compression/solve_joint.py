"""Factor the weights of a group that read one input on one input factor, from their statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eckart.compression.settings import Settings
from eckart.linalg import Factorization, Problem, factorize_jointly, group_curve_under
from eckart.model import Site
from eckart.moments import Moments


@dataclass(frozen=True)
class JointFactors:
    """The factors of a group up to its largest possible rank.

    Attributes:
        lefts: site -> B_i, (m_i, r).
        right: A, (r, n), of all.
        losses: (r' + 1,) predicted change of the loss of all sites together at rank 0, 1, ...; None where it is not
            asked for.
        means: site -> (n,) E[x], where its bias absorbs it.
        notes: fallbacks.
    """

    lefts: Mapping[str, Tensor]
    right: Tensor
    losses: Tensor | None = None
    means: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """The sites, the one that will hold A first."""
        return tuple(self.lefts)

    def serialize(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return named tensors and JSON values, as a store keeps them."""
        tensors = {f"left.{name}": left for name, left in self.lefts.items()} | {"right": self.right}
        tensors |= {f"mean.{name}": mean for name, mean in self.means.items()}
        if self.losses is not None:
            tensors["losses"] = self.losses
        return tensors, {"members": list(self.members), "notes": list(self.notes)}

    @classmethod
    def deserialize(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> JointFactors:
        """Rebuild the factors from what :meth:`serialize` returned."""
        members = content["members"]
        return cls(
            {name: tensors[f"left.{name}"] for name in members},
            tensors["right"],
            tensors.get("losses"),
            {name: tensors[f"mean.{name}"] for name in members if f"mean.{name}" in tensors},
            tuple(content["notes"]),
        )


def solve_joint(
    sites: Sequence[Site],
    weights: Sequence[Tensor],
    moments: Sequence[Moments | None],
    settings: Settings,
    limit: int,
    *,
    curve: bool,
) -> JointFactors:
    """Factor weights that read one input: `min sum_i || L_i (W_i - B_i A) R ||^2` over one A for all.

    Args:
        sites: what they are.
        weights: (out, in) of each.
        moments: of each; the statistics of the input are the same ones.
        settings: the method.
        limit: the largest rank that may be asked for.
        curve: whether the predicted loss of every rank is wanted.
    """
    means = center_together(sites, moments, settings)
    problems = [settings.method.metric(weight, entry) for weight, entry in zip(weights, moments, strict=True)]  # type: ignore[arg-type]
    what = " and ".join(site.name for site in sites)
    found = factorize_jointly(problems, what)
    losses = None
    if curve and moments[0] is not None:
        losses = _losses(found, problems, moments, settings)
    kept = [factors.kept(limit) for factors in found]
    lefts = {site.name: factors.left for site, factors in zip(sites, kept, strict=True)}
    return JointFactors(lefts, kept[0].right, losses, means, tuple(note for each in found for note in each.notes))


def center_together(sites: Sequence[Site], moments: Sequence[Moments | None], settings: Settings) -> dict[str, Tensor]:
    """Decide for a group whether its metric is centered: if the biases of all sites absorb the mean.

    One metric of the input serves all. A bias corrects the mean output in either case.

    Returns:
        Site -> mean of its input, of the sites whose bias absorbs it.
    """
    centered = settings.method.centered and all(site.has_bias for site in sites)
    means: dict[str, Tensor] = {}
    for site, entry in zip(sites, moments, strict=True):
        if entry is not None:
            entry.centered = centered
            if settings.method.centered and site.has_bias:
                means[site.name] = entry.mean
    return means


def _losses(
    found: Sequence[Factorization], problems: Sequence[Problem], moments: Sequence[Moments | None], settings: Settings
) -> Tensor:
    """Predicted change of the loss per sequence at every rank, as of a single site."""
    first = moments[0]
    assert first is not None
    metric = settings.loss_metric
    if settings.method.metric is metric:
        errors = found[0].curve
    else:
        known = [entry for entry in moments if entry is not None]
        measured = [metric(problem.target, entry) for problem, entry in zip(problems, known, strict=True)]
        errors = group_curve_under(found, measured)
    return (0.5 * first.tokens / max(first.sequences, 1) * errors).to(torch.float64)
