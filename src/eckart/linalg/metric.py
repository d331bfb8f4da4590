"""Metrics: positive semi-definite weightings of an error, on its output side and its input side.

The error of a factored weight W' against its target T is

    || L (T - W') R ||_F^2 = tr( H E G E^T ),   E = T - W',  H = L^T L,  G = R R^T,

so a metric is stored as its matrix H or G, never as a root: a root is taken where one is needed, and
only of the side where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.linalg.decompose import checked_eigh

# An eigenvalue below this fraction of the largest is rounding noise of a float64 eigh.
RELATIVE_FLOOR = 1e-13


@dataclass(frozen=True)
class Metric:
    """Identity (both fields None), a diagonal, or a full matrix.

    Attributes:
        diagonal: (n,) non-negative weights of the squared error, or None.
        full: (n, n) symmetric positive semi-definite, or None.
    """

    diagonal: Tensor | None = None
    full: Tensor | None = None

    @property
    def is_identity(self) -> bool:
        """Whether every direction weighs the same."""
        return self.diagonal is None and self.full is None

    def times(self, matrix: Tensor) -> Tensor:
        """`M @ matrix` for matrix (n, k)."""
        if self.full is not None:
            return self.full.to(matrix) @ matrix
        if self.diagonal is not None:
            return self.diagonal.to(matrix)[:, None] * matrix
        return matrix

    def shrunk(self, amount: float) -> Metric:
        """`(1 - amount) M + amount mean(diag M) I`: bounds the condition number by 1 + (1 - s) n / s."""
        if self.full is None or amount == 0:
            return self
        mean = self.full.diagonal().mean()
        full = self.full * (1 - amount)
        full.diagonal().add_(amount * mean)
        return Metric(full=full)

    def to(self, device: torch.device) -> Metric:
        """The same metric on another device."""
        return Metric(
            None if self.diagonal is None else self.diagonal.to(device),
            None if self.full is None else self.full.to(device),
        )


@dataclass(frozen=True)
class Root:
    """C with `C C^T = M`, and its inverse where there is one.

    Attributes:
        kind: "identity", "diagonal" (values (n,)), "triangular" (values lower (n, n)) or "general"
            (values (n, n), singular: no inverse).
        values: the root itself, float64.
        notes: fallbacks taken on the way.
    """

    kind: str
    values: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def invertible(self) -> bool:
        """Whether :meth:`solve_right` may be called."""
        return self.kind != "general"

    def right_of(self, matrix: Tensor) -> Tensor:
        """`matrix @ C` for matrix (m, n)."""
        if self.values is None:
            return matrix
        values = self.values.to(matrix.dtype)
        return matrix * values if self.kind == "diagonal" else matrix @ values

    def solve_right(self, matrix: Tensor) -> Tensor:
        """`matrix @ C^-1` for matrix (k, n)."""
        if self.values is None:
            return matrix
        if self.kind == "diagonal":
            return matrix / self.values.to(matrix.dtype)
        return torch.linalg.solve_triangular(self.values.to(matrix.dtype), matrix, upper=False, left=False)


def root_of(metric: Metric, what: str = "metric", *, inverted: bool = True) -> Root:
    """A root of a metric: Cholesky where the matrix is safely positive definite, else eigenvectors.

    Args:
        metric: the metric M, (n, n).
        what: name used in errors and notes.
        inverted: whether the root will be inverted, and must be well conditioned to be called invertible.

    Returns:
        The root C, `C C^T = M`; singular directions are dropped by a relative floor, never by an
        absolute jitter.

    Raises:
        NumericalError: if the metric is not finite.
    """
    if metric.is_identity:
        return Root("identity")
    if metric.diagonal is not None:
        values = metric.diagonal.double().clamp_min(0).sqrt()
        if bool((values > values.amax() * RELATIVE_FLOOR**0.5).all()) and bool(values.amax() > 0):
            return Root("diagonal", values)
        return Root("general", torch.diag(values))
    assert metric.full is not None
    full = metric.full.double()
    lower, info = torch.linalg.cholesky_ex(full)
    if int(info) == 0:
        diagonal = lower.diagonal()
        # The diagonal of a Cholesky factor shows a singular matrix: 1e-6 of the largest is cond ~ 1e12.
        # As a factor alone it is backward stable however small its diagonal gets.
        if not inverted or bool(diagonal.amin() > 1e-6 * diagonal.amax()):
            return Root("triangular", lower)
    values, vectors, notes = checked_eigh(full, what)
    values = torch.where(values > values[0] * RELATIVE_FLOOR, values, torch.zeros_like(values))
    return Root("general", vectors * values.sqrt(), notes)


def weighted_error(error: Tensor, left: Metric, right: Metric) -> Tensor:
    """`|| L error R ||_F^2 = tr(H E G E^T)`, in the precision of `error`.

    Args:
        error: (m, n), usually `T - W'`.
        left: H, (m, m), the metric of the outputs.
        right: G, (n, n), the metric of the inputs.

    Returns:
        A scalar tensor.
    """
    return (left.times(error) * right.times(error.mT).mT).sum()
