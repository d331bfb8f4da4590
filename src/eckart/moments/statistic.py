"""What a statistic is: sums over the calibration text that metrics read.

A new statistic is one file that defines a subclass of :class:`InputStatistic`, :class:`GradientStatistic` or
:class:`SequenceStatistic`, and one line in `STATISTICS` of `eckart.registry`. A method asks for it by name in
`Method.needs`, and its metric function reads it as `moments["name"]`.

Sums and token counts, never means, so that two statistics over different text add up to the one over both. An update
that runs out of memory has added nothing: what it needs is allocated before anything is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from eckart.registry import STATISTICS

FLOAT32, FLOAT64 = 4, 8
"""Bytes of a number."""

MEAN = "mean"
"""The statistic that is always gathered: it counts the tokens."""


class Statistic:
    """Sums of one site, or of all sites that share an input.

    The public attributes of an instance are its sums (tensors, None before the first update) and its counts (ints).
    They are what is merged, serialized, and added up over processes. It is constructed without arguments.

    Attributes:
        needs_backward: whether gradients are needed, and with them a backward pass.
        shares_basis: whether sums over several layers mean something, so that those may share a basis.
        in_pieces: whether a module that several blocks call may be added call by call, block by block.
    """

    needs_backward: ClassVar[bool] = True
    shares_basis: ClassVar[bool] = False
    in_pieces: ClassVar[bool] = True

    @classmethod
    def nbytes(cls, out_features: int, in_features: int) -> int:
        """Bytes that the sums of a weight (out, in) take."""
        raise NotImplementedError(f"{cls.__name__}.nbytes: say how many bytes the sums take")

    def merge(self, other: Self) -> None:
        """Add what another statistic of the same kind saw of other text; the other one is left as it is."""
        for name, value in other._sums().items():
            setattr(self, name, _added(getattr(self, name), value))

    def state(self) -> dict[str, Tensor]:
        """The sums themselves, not copies, and the counts as int64 tensors; a sum that saw nothing is absent."""
        return {
            name: torch.tensor(value) if isinstance(value, int) else value
            for name, value in self._sums().items()
            if value is not None
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The statistic that :meth:`state` serialized, on the same tensors."""
        found = cls()
        for name, value in state.items():
            setattr(found, name, int(value) if isinstance(getattr(found, name), int) else value)
        return found

    @property
    def is_zero(self) -> bool:
        """Whether nothing but zeros was seen."""
        return not any(bool(value.any()) for value in self._sums().values() if isinstance(value, Tensor))

    def _sums(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class InputStatistic(Statistic):
    """Of what a site reads. All sites that share an input share the object."""

    needs_backward = False
    shares_basis = True

    def update(self, rows: Tensor) -> None:
        """Add tokens.

        Args:
            rows: (tokens, n), float32 and finite, without padding.
        """
        raise NotImplementedError


class GradientStatistic(Statistic):
    """Of the gradients of the loss at a site's output, token by token."""

    def update(self, rows: Tensor) -> None:
        """Add tokens.

        Args:
            rows: (tokens, m), float32 and finite, without padding.
        """
        raise NotImplementedError


class SequenceStatistic(Statistic):
    """Of the inputs and output gradients of whole sequences: all calls of a site in one pass come together."""

    in_pieces = False

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add sequences.

        Args:
            inputs: (B, T, n), zero where padded.
            gradients: (B, T, m), likewise.
        """
        raise NotImplementedError


def statistics_named(needs: Iterable[str]) -> dict[str, type[Statistic]]:
    """The statistics of these names, in the order of the registry.

    Raises:
        UsageError: there is none of a name.
    """
    wanted = {STATISTICS.check(name) for name in needs}
    return {name: STATISTICS[name] for name in STATISTICS if name in wanted}


def needs_backward(needs: Iterable[str]) -> bool:
    """Whether any of the named statistics needs a backward pass."""
    return any(kind.needs_backward for kind in statistics_named(needs).values())


def _added(first: Any, second: Any) -> Any:
    """The sum, in place in `first` where its dtype allows: a wide one is not held twice."""
    if second is None:
        return first
    if not isinstance(second, Tensor):
        return first + second
    if first is None:
        return second.clone()  # sums are added to in place, and the other statistic keeps its own
    return first.to(torch.promote_types(first.dtype, second.dtype)).add_(second)
