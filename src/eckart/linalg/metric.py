"""Metrics: positive semi-definite weightings of an error, on its output side and its input side.

The error of a factored weight W' against its target T is

    || L (T - W') R ||_F^2 = tr( H E G E^T ),   E = T - W',  H = L^T L,  G = R R^T,

so a metric is stored as its matrix H or G, never as a root: a root is taken where one is needed, and
only of the side where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eckart.linalg.blocks import blocks
from eckart.linalg.decompose import WIDE, checked_eigh

# An eigenvalue below this fraction of the largest is rounding noise of a float64 eigh.
RELATIVE_FLOOR = 1e-13


@dataclass(frozen=True)
class Metric:
    """Identity (no field given), a diagonal, or `M = scale full - mean mean^T + ridge I`.

    The three terms stay apart: a wide sum of `x x^T` becomes a shrunk mean, or a covariance, without a copy of it.

    Attributes:
        diagonal: (n,) non-negative weights of the squared error, or None.
        full: (n, n) symmetric, or None; read, never written.
        scale: of `full`.
        mean: (n,) what is taken off, or None.
        ridge: what is added to the diagonal.
    """

    diagonal: Tensor | None = None
    full: Tensor | None = None
    scale: float = 1.0
    mean: Tensor | None = None
    ridge: float = 0.0

    @property
    def is_identity(self) -> bool:
        """Whether every direction weighs the same."""
        return self.diagonal is None and self.full is None

    @property
    def mean_diagonal(self) -> float:
        """Of M: 1 for an identity."""
        if self.full is None:
            return 1.0 if self.diagonal is None else float(self.diagonal.double().mean())
        mean = self.scale * float(self.full.diagonal().double().mean()) + self.ridge
        return mean if self.mean is None else mean - float(self.mean.double().square().mean())

    @property
    def matrix(self) -> Tensor:
        """M, (n, n), a new tensor in the dtype of its parts."""
        part = self.diagonal if self.full is None else self.full
        assert part is not None, "an identity has no size"
        return self.dense(part.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """M, (n, n), a new tensor in the given dtype; not for an identity, which has no size."""
        if self.full is None:
            assert self.diagonal is not None, "an identity has no size"
            return torch.diag(self.diagonal.detach().to(dtype))
        matrix = self.full.detach().to(dtype, copy=True).mul_(self.scale)
        if self.mean is not None:
            mean = self.mean.to(matrix)
            matrix.addr_(mean, mean, alpha=-1)
        matrix.diagonal().add_(self.ridge)
        return matrix

    def times(self, matrix: Tensor) -> Tensor:
        """`M @ matrix` for matrix (n, k)."""
        if self.full is None:
            return matrix if self.diagonal is None else self.diagonal.to(matrix)[:, None] * matrix
        product = _times(self.full, matrix).mul_(self.scale)
        if self.mean is not None:
            mean = self.mean.to(matrix)
            product.addr_(mean, matrix.mT @ mean, alpha=-1)
        return product.add_(matrix, alpha=self.ridge) if self.ridge else product

    def shrunk(self, amount: float) -> Metric:
        """`(1 - amount) M + amount mean(diag M) I`: bounds the condition number by 1 + (1 - s) n / s."""
        if self.is_identity or amount == 0:
            return self
        return self.mixed(1 - amount, amount * self.mean_diagonal)

    def mixed(self, rest: float, ridge: float) -> Metric:
        """`rest M + ridge I`; not for an identity, which has no size."""
        if self.full is None:
            assert self.diagonal is not None, "an identity has no size"
            return Metric(diagonal=rest * self.diagonal + ridge)
        return replace(
            self,
            scale=rest * self.scale,
            mean=None if self.mean is None else rest**0.5 * self.mean,
            ridge=rest * self.ridge + ridge,
        )

    def root(self, what: str = "metric", *, inverted: bool = True) -> Root:
        """C with `C C^T = M`: Cholesky where the matrix is safely positive definite, else eigenvectors.

        Args:
            what: name used in errors and notes.
            inverted: whether the root will be inverted, and must be well conditioned to be called invertible.

        Returns:
            The root; singular directions are dropped by a relative floor, never by an absolute jitter.

        Raises:
            NumericalError: if the metric is not finite.
        """
        if self.is_identity:
            return Root("identity")
        if self.diagonal is not None:
            values = self.diagonal.double().clamp_min(0).sqrt()
            if bool((values > values.amax() * RELATIVE_FLOOR**0.5).all()) and bool(values.amax() > 0):
                return Root("diagonal", values)
            return Root("general", torch.diag(values))
        full = self.dense(torch.float64)
        lower, info = torch.linalg.cholesky_ex(full)
        if int(info) == 0:
            diagonal = lower.diagonal()
            # The diagonal of a Cholesky factor shows a singular matrix: 1e-6 of the largest is cond ~ 1e12.
            # As a factor alone it is backward stable however small its diagonal gets.
            if not inverted or bool(diagonal.amin() > 1e-6 * diagonal.amax()):
                return Root("triangular", lower)
        del lower
        if not inverted and len(full) > WIDE:
            full = full.float()  # as exact as the sum that it is
        values, vectors, notes = checked_eigh(full, what)
        values = torch.where(values > values[0] * RELATIVE_FLOOR, values, torch.zeros_like(values))
        return Root("general", vectors.mul_(values.sqrt().to(vectors.dtype)), notes)


def _times(full: Tensor, matrix: Tensor) -> Tensor:
    """`full @ matrix`, a new tensor in the dtype of `matrix`."""
    if full.dtype == matrix.dtype and full.device == matrix.device:
        return full @ matrix
    product = matrix.new_empty(full.shape[0], matrix.shape[1])
    for part in blocks(len(full)):
        product[part] = full[part].to(matrix) @ matrix
    return product


def sandwich(metric: Metric, matrix: Tensor) -> Tensor:
    """`matrix^T M matrix`, (k, k), for matrix (n, k)."""
    product = matrix.new_empty(matrix.shape[1], matrix.shape[1])
    for part in blocks(matrix.shape[1]):
        product[:, part] = matrix.mT @ metric.times(matrix[:, part])
    return product


@dataclass(frozen=True)
class Root:
    """C with `C C^T = M`, and its inverse where there is one.

    Attributes:
        kind: "identity", "diagonal" (values (n,)), "triangular" (values lower (n, n)) or "general"
            (values (n, n), singular: no inverse).
        values: the root itself, float64 as :func:`root_of` gives it.
        notes: fallbacks taken on the way.
    """

    kind: str
    values: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def invertible(self) -> bool:
        """Whether :meth:`solve_right` may be called."""
        return self.kind != "general"

    def to(self, dtype: torch.dtype) -> Root:
        """The same root in another precision, converted once for all products that follow."""
        return self if self.values is None else replace(self, values=self.values.to(dtype))

    def times(self, matrix: Tensor) -> Tensor:
        """`C @ matrix` for matrix (n, k)."""
        if self.values is None:
            return matrix
        values = self.values.to(matrix.dtype)
        return values[:, None] * matrix if self.kind == "diagonal" else values @ matrix

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


def weighted_error(error: Tensor, left: Metric, right: Metric) -> Tensor:
    """`|| L error R ||_F^2 = tr(H E G E^T)`; products in the precision of `error`, their sum in float64.

    Args:
        error: (m, n), usually `T - W'`.
        left: H, (m, m), the metric of the outputs.
        right: G, (n, n), the metric of the inputs.

    Returns:
        A scalar tensor.
    """
    weighted = right.times(error.mT)  # (n, m), G E^T
    total = torch.zeros((), dtype=torch.float64, device=error.device)
    for part in blocks(error.shape[1]):
        total += (left.times(error[:, part]) * weighted[part].mT).sum(dtype=torch.float64)
    return total
