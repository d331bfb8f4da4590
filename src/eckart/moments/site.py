"""All that a metric may ask of a site, and the statistics of all sites as plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from eckart.linalg import Metric
from eckart.moments.statistic import MEAN, InputStatistic, Statistic, statistics_named
from eckart.registry import STATISTICS


@dataclass
class Moments:
    """The statistics of a site, by name: `moments["gram"]`, `moments["fisher"].rows`.

    Attributes:
        statistics: name -> statistic. Those of the inputs are the same objects for all sites that share an input.
        sequences: how many sequences the run saw; with :attr:`tokens`, tokens per sequence.
        centered: whether the bias absorbs the means, so that the error is measured by the covariance.
    """

    statistics: dict[str, Statistic] = field(default_factory=dict)
    sequences: int = 0
    centered: bool = False

    @classmethod
    def empty(cls, needs: Iterable[str], shared: Mapping[str, Statistic] | None = None) -> Moments:
        """Statistics that have seen nothing.

        Args:
            needs: names of statistics; "mean" is always there.
            shared: those of the inputs that other sites of the group have already.
        """
        kinds = statistics_named({MEAN, *needs})
        return cls({name: (shared or {}).get(name) or kind() for name, kind in kinds.items()})

    def __getitem__(self, name: str) -> Any:
        if name not in self.statistics:
            raise KeyError(f"statistic {name!r} was not gathered. Name it in the method's `needs`.")
        return self.statistics[name]

    def __contains__(self, name: str) -> bool:
        return name in self.statistics

    @property
    def shared(self) -> dict[str, Statistic]:
        """The statistics of the inputs."""
        return {name: found for name, found in self.statistics.items() if isinstance(found, InputStatistic)}

    @property
    def own(self) -> dict[str, Statistic]:
        """The statistics of this site alone."""
        return {name: found for name, found in self.statistics.items() if not isinstance(found, InputStatistic)}

    @property
    def tokens(self) -> int:
        """How many tokens reached the site."""
        return int(self[MEAN].count)

    @property
    def mean(self) -> Tensor:
        """`E[x]`, (n,), float64."""
        mean: Tensor = self[MEAN].mean
        return mean

    @property
    def input_metric(self) -> Metric:
        """`E[x x^T]`, or the covariance of x where the bias absorbs the means; nothing of its size is made."""
        metric: Metric = self["gram"].metric
        if not self.centered:
            return metric
        centered = replace(metric, mean=self.mean)
        rounding = 4 * torch.finfo(torch.float32).eps  # of a batch's products, whatever they are summed in
        # Of inputs that never varied nothing but rounding is left, which must not look like a direction.
        return replace(metric, scale=0.0) if centered.mean_diagonal <= rounding * metric.mean_diagonal else centered

    @property
    def input_gram(self) -> Tensor:
        """The matrix of :attr:`input_metric`, (n, n), a new tensor."""
        return self.input_metric.matrix

    def with_statistics(self, statistics: Mapping[str, Statistic]) -> Moments:
        """The same site with other statistics."""
        return replace(self, statistics=dict(statistics))

    def state(self) -> dict[str, Tensor]:
        """Tensors as `gram.count`, `fisher.rows` and so on, `sequences`, and `centered` where it is set.

        Sites of a group would each name the same inputs: :func:`serialize` names them once.
        """
        state = {"sequences": torch.tensor(self.sequences)}
        for name, statistic in self.statistics.items():
            state |= {f"{name}.{key}": tensor for key, tensor in statistic.state().items()}
        return state | ({"centered": torch.tensor(1)} if self.centered else {})

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Moments:
        """What :meth:`state` serialized, on the same tensors."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            name, _, attribute = key.rpartition(".")
            parts.setdefault(name, {})[attribute] = tensor
        whole = parts.pop("", {})
        statistics = {name: STATISTICS[name].from_state(own) for name, own in parts.items()}
        return cls(statistics, int(whole["sequences"]), "centered" in whole)


def serialize(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Statistics of sites as plain tensors, to be summed over processes in place, or saved.

    Returns:
        `<site>:<key of its state>` -> tensor. The sums are the statistics' own; counts are int64 on the CPU. What a
        group shares is named by its first site alone. What was not gathered, or saw nothing, is absent.
    """
    state: dict[str, Tensor] = {}
    named: set[int] = set()
    for site, entry in moments.items():
        new = {name: found for name, found in entry.statistics.items() if id(found) not in named}
        named |= {id(found) for found in new.values()}
        state |= {f"{site}:{key}": tensor for key, tensor in entry.with_statistics(new).state().items()}
    return state


def deserialize(state: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]) -> dict[str, Moments]:
    """What :func:`serialize` made, on the same tensors.

    Args:
        state: of sites in these groups.
        groups: leader -> members; those in `state` share the statistics of their input again.
    """
    sites: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        site, _, part = key.rpartition(":")
        sites.setdefault(site, {})[part] = tensor
    moments: dict[str, Moments] = {}
    for members in groups.values():
        shared: dict[str, Statistic] = {}
        for site in (name for name in members if name in sites):
            entry = Moments.from_state(sites[site])
            shared |= entry.shared
            entry.statistics = {**entry.statistics, **shared}
            moments[site] = entry
    return moments
