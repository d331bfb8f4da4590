"""The metric of stacked outputs: a block for each of several weights, never one large matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eckart.linalg.metric import Metric, Root


@dataclass(frozen=True)
class BlockMetric(Metric):
    """`M = diag(M_1, M_2, ...)`: errors of different weights do not meet.

    Made by :func:`stack_metrics`. The four fields of :class:`Metric` stay empty.

    Attributes:
        parts: the M_i; an identity among them weighs each of its outputs by 1.
        heights: m_i, the outputs of each.
    """

    parts: tuple[Metric, ...] = ()
    heights: tuple[int, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether every direction weighs the same."""
        return all(part.is_identity for part in self.parts)

    @property
    def mean_diagonal(self) -> float:
        """Of M."""
        total = sum(height * part.mean_diagonal for part, height in zip(self.parts, self.heights, strict=True))
        return total / sum(self.heights)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """M, (sum m_i, sum m_i), a new tensor; for small ones: the solver never asks for it."""
        pairs = zip(self.parts, self.heights, strict=True)
        return torch.block_diag(*(torch.eye(m, dtype=dtype) if p.is_identity else p.dense(dtype) for p, m in pairs))

    @property
    def matrix(self) -> Tensor:
        """M in float64."""
        return self.dense(torch.float64)

    def times(self, matrix: Tensor) -> Tensor:
        """`M @ matrix` for matrix (sum m_i, k)."""
        rows = matrix.split(self.heights)
        return torch.cat([part.times(own) for part, own in zip(self.parts, rows, strict=True)])

    def mixed(self, rest: float, ridge: float) -> Metric:
        """`rest M + ridge I`."""
        pairs = zip(self.parts, self.heights, strict=True)
        sized = (Metric(diagonal=torch.ones(m, dtype=torch.float64)) if p.is_identity else p for p, m in pairs)
        return replace(self, parts=tuple(part.mixed(rest, ridge) for part in sized))

    def root(self, what: str = "metric", *, inverted: bool = True) -> Root:
        """The roots of the blocks, each of its own kind."""
        roots = tuple(part.root(f"{what} {i + 1}", inverted=inverted) for i, part in enumerate(self.parts))
        return BlockRoot("blocks", None, tuple(note for root in roots for note in root.notes), roots, self.heights)


@dataclass(frozen=True)
class BlockRoot(Root):
    """`C = diag(C_1, C_2, ...)`.

    Attributes:
        parts: the C_i.
        heights: m_i.
    """

    parts: tuple[Root, ...] = ()
    heights: tuple[int, ...] = ()

    @property
    def invertible(self) -> bool:
        """Whether :meth:`solve_right` may be called."""
        return all(part.invertible for part in self.parts)

    def to(self, dtype: torch.dtype) -> Root:
        """The same root in another precision."""
        return replace(self, parts=tuple(part.to(dtype) for part in self.parts))

    def times(self, matrix: Tensor) -> Tensor:
        """`C @ matrix` for matrix (sum m_i, k)."""
        rows = matrix.split(self.heights)
        return torch.cat([part.times(own) for part, own in zip(self.parts, rows, strict=True)])

    def right_of(self, matrix: Tensor) -> Tensor:
        """`matrix @ C` for matrix (k, sum m_i)."""
        columns = matrix.split(self.heights, dim=1)
        return torch.cat([part.right_of(own) for part, own in zip(self.parts, columns, strict=True)], dim=1)

    def solve_right(self, matrix: Tensor) -> Tensor:
        """`matrix @ C^-1` for matrix (k, sum m_i)."""
        columns = matrix.split(self.heights, dim=1)
        return torch.cat([part.solve_right(own) for part, own in zip(self.parts, columns, strict=True)], dim=1)


def stack_metrics(metrics: Sequence[Metric], heights: Sequence[int]) -> Metric:
    """The metric of stacked outputs, in its simplest kind: an identity, a diagonal, or blocks.

    Args:
        metrics: of the outputs of each weight.
        heights: m_i, how many outputs each has.
    """
    if all(metric.is_identity for metric in metrics):
        return Metric()
    if all(metric.is_identity or metric.diagonal is not None for metric in metrics):
        given = next(metric.diagonal for metric in metrics if metric.diagonal is not None)
        pairs = zip(metrics, heights, strict=True)
        return Metric(diagonal=torch.cat([given.new_ones(h) if m.diagonal is None else m.diagonal for m, h in pairs]))
    return BlockMetric(parts=tuple(metrics), heights=tuple(heights))
