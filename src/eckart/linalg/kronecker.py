"""The nearest sum of Kronecker products (Van Loan & Pitsianis 1993), and the weighted one, approximately.

    W = sum_i A_i (x) B_i,    W (m, n), A_i (m1, n1), B_i (m2, n2), m = m1 m2, n = n1 n2

Cut W into blocks of B's shape and lay each out as a row: a Kronecker product becomes a matrix of rank one,

    rearranged(A (x) B) = vec(A) vec(B)^T,

and nothing but the order of the entries has changed, so the truncated SVD of the rearranged W is the nearest sum of r
products. Factors are kept in that form: left (m1 n1, r) holds the vec(A_i), right (r, m2 n2) the vec(B_i), row by row.

A metric does not keep this structure, unless it is a Kronecker product itself. For any other,
`min || L (T - sum A_i (x) B_i) R ||_F^2` is solved by alternating least squares: exact in each half, but only a local
optimum of both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.linalg.decompose import checked_svd, require_finite
from eckart.linalg.metric import Metric, weighted_error
from eckart.linalg.solve import Factorization, Factors, Problem, factorize

Block = tuple[int, int]
"""(m2, n2), the shape of the second factor."""

SWEEPS = 6
"""How many times alternating least squares solves each side, at most."""

STEPS = 8
"""Of conjugate gradients in each half sweep; the next sweep starts from their result."""

ENOUGH = 1e-4
"""A sweep that lowers the objective by a smaller part of it is the last."""

SEPARABLE = 1e-12
"""How far, relatively and squared, a diagonal may be from a Kronecker product and count as one."""


def rearranged(weight: Tensor, block: Block) -> Tensor:
    """The blocks of W, each laid out as a row: (m, n) -> (m1 n1, m2 n2).

    Raises:
        UsageError: if the blocks do not divide the weight.
    """
    (m, n), (m2, n2) = weight.shape, block
    if m2 < 1 or n2 < 1 or m % m2 or n % n2:
        raise UsageError(f"blocks of {m2} x {n2} do not divide a weight of {m} x {n}; choose divisors of both sides.")
    return weight.reshape(m // m2, m2, n // n2, n2).transpose(1, 2).reshape(-1, m2 * n2)


def rearranged_back(rows: Tensor, shape: tuple[int, int], block: Block) -> Tensor:
    """The inverse of :func:`rearranged`: (m1 n1, m2 n2) -> (m, n)."""
    (m, n), (m2, n2) = shape, block
    return rows.reshape(m // m2, n // n2, m2, n2).transpose(1, 2).reshape(m, n)


def kronecker_factorize(problem: Problem, block: Block, limit: int, what: str = "weight") -> Factorization:
    """Sums of Kronecker products for every number of terms at once.

    Exact where both metrics are identities, or diagonals that are Kronecker products `d1 (x) d2` themselves: the
    curve is the singular tail. Elsewhere approximate: alternating least squares at `limit` terms, whose SVD gives the
    sums of fewer; the curve is measured, and a note holds the objective of each sweep.

    Args:
        problem: target (m, n) and metrics.
        block: (m2, n2).
        limit: the largest number of terms that may be asked for; an exact solution has all.
        what: the site's name, used in errors and notes.

    Returns:
        Factors left (m1 n1, r) and right (r, m2 n2) of the rearranged matrix.

    Raises:
        UsageError: if the blocks do not divide the weight.
        NumericalError: if something is not finite, or nothing converges.
    """
    require_finite(problem.target, what)
    target = problem.target.to(torch.promote_types(problem.target.dtype, torch.float32))
    rows = rearranged(target, block)
    scales = _separated(problem, block)
    if scales is None:
        return _alternating(Problem(target, problem.left, problem.right), block, limit, what)
    left, right = (scale.to(target) for scale in scales)
    solved = factorize(Problem(left[:, None] * rows * right), what)
    return solved.changed(lambda a, b: (a / left[:, None], b / right))


def _separated(problem: Problem, block: Block) -> tuple[Tensor, Tensor] | None:
    """Roots of the weights of the rearranged rows (m1 n1) and columns (m2 n2); None if there are none."""
    (m, n), (m2, n2) = problem.target.shape, block
    outputs, inputs = _split(problem.left, m, m2), _split(problem.right, n, n2)
    if outputs is None or inputs is None:
        return None
    return torch.outer(outputs[0], inputs[0]).flatten().sqrt(), torch.outer(outputs[1], inputs[1]).flatten().sqrt()


def _split(metric: Metric, size: int, inner: int) -> tuple[Tensor, Tensor] | None:
    """d1 (size / inner) and d2 (inner), all positive, with `diagonal = d1 (x) d2`; None if there are none."""
    if metric.full is not None:
        return None
    if metric.diagonal is None:
        return torch.ones(size // inner, dtype=torch.float64), torch.ones(inner, dtype=torch.float64)
    table = metric.diagonal.detach().double().cpu().reshape(-1, inner)
    if not bool((table > 0).all()):
        return None
    left, right = table.mean(1), table.mean(0) / table.mean()
    error = (table - torch.outer(left, right)).square().sum()
    return (left, right) if float(error) <= SEPARABLE * float(table.square().sum()) else None


# -- a general metric ----------------------------------------------------------------------------------


def _alternating(problem: Problem, block: Block, limit: int, what: str) -> Factorization:
    shape, rows = tuple(problem.target.shape), rearranged(problem.target, block)
    assert len(shape) == 2
    start = factorize(Problem(rows), what)
    rank = min(limit, len(start.squared))
    left, right, history = alternating(problem, block, start.truncated(rank))
    # Terms of a sum can be mixed without changing it; sorted by size they can be truncated.
    u, s, v, notes = checked_svd(torch.linalg.qr(left, mode="r").R.double() @ right.double(), what)
    basis = torch.linalg.qr(left.double()).Q @ u
    left, right = (basis * s).to(left.dtype), v.to(left.dtype)
    found = Factorization((left, right), left.new_zeros(rank, dtype=torch.float64))
    curve = kronecker_curve_under(found, problem, block, shape)
    # A truncated sum may get worse with one more term; no rank is predicted to be worse than a smaller one.
    curve = torch.cummin(curve, 0).values
    squared = torch.cat([-curve.diff(), curve[-1:]])
    listed = ", ".join(f"{value:.6g}" for value in history)
    note = (
        f"{what}: approximate, alternating least squares at {rank} terms of {block[0]} x {block[1]}; objective {listed}"
    )
    return Factorization((left, right), squared, (note, *start.notes, *notes))


def alternating(problem: Problem, block: Block, start: Factors) -> tuple[Tensor, Tensor, list[float]]:
    """Lower `|| L (T - sum A_i (x) B_i) R ||_F^2` in turn over all A_i and over all B_i.

    Each half is a linear least squares problem, solved by conjugate gradients from where the half before it ended;
    it never raises the objective, and a sweep that would is discarded.

    Args:
        problem: target (m, n) and metrics.
        block: (m2, n2).
        start: left (m1 n1, r) and right (r, m2 n2).

    Returns:
        left, right, and the objective at the start and after each sweep, falling.
    """
    target = problem.target
    shape = (target.shape[0], target.shape[1])

    def weighted(rows: Tensor) -> Tensor:
        """`H E G` of a rearranged E, rearranged."""
        dense = rearranged_back(rows, shape, block)
        return rearranged(problem.left.times(problem.right.times(dense.mT).mT), block)

    def objective(left: Tensor, right: Tensor) -> float:
        error = target - rearranged_back(left @ right, shape, block)
        return max(0.0, float(weighted_error(error, problem.left, problem.right)))

    def of_left(fixed: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda left: weighted(left @ fixed) @ fixed.mT

    def of_right(fixed: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda right: fixed.mT @ weighted(fixed @ right)

    wanted = weighted(rearranged(target, block))
    left, right = start
    history = [objective(left, right)]
    for _ in range(SWEEPS):
        # Orthonormal rows or columns of the side that stays: the same problem, better conditioned.
        rest, triangle = torch.linalg.qr(right.mT)
        new_left = _least_squares(of_left(rest.mT), wanted @ rest, left @ triangle.mT)
        basis, triangle = torch.linalg.qr(new_left)
        new_right = _least_squares(of_right(basis), basis.mT @ wanted, triangle @ rest.mT)
        now = objective(basis, new_right)
        if not now < history[-1]:  # rounding is all that is left
            break
        left, right = basis, new_right
        history.append(now)
        if history[-2] - now <= ENOUGH * history[-2]:
            break
    return left, right, history


def _least_squares(normal: Callable[[Tensor], Tensor], wanted: Tensor, start: Tensor) -> Tensor:
    """Conjugate gradients on `normal(x) = wanted`, a positive semi-definite system."""
    x = start.clone()
    residual = wanted - normal(x)
    direction = residual.clone()
    size = residual.square().sum()
    for _ in range(STEPS):
        image = normal(direction)
        curvature = (direction * image).sum()
        if not float(curvature) > 0:  # solved, or the metric does not see this direction
            break
        step = size / curvature
        x += step * direction
        residual -= step * image
        size, before = residual.square().sum(), size
        direction = residual + size / before * direction
    return x


def kronecker_curve_under(
    solved: Factorization, problem: Problem, block: Block, shape: tuple[int, int], limit: int | None = None
) -> Tensor:
    """Squared error of the sums of 0, 1, ..., r products, measured in any problem's metric.

    Args:
        solved: left (m1 n1, r) and right (r, m2 n2).
        problem: target and the metrics H, G to measure in.
        block: (m2, n2).
        shape: (m, n).
        limit: the last number of terms that is of interest.

    Returns:
        (r + 1,) `tr(H E_k G E_k^T)`, float64.
    """
    left, right = solved.factors if limit is None else solved.truncated(min(limit, len(solved.squared)))
    dtype = torch.promote_types(problem.target.dtype, left.dtype)
    rows = rearranged(problem.target.to(dtype), block).clone()
    errors = [weighted_error(problem.target.to(dtype), problem.left, problem.right)]
    for k in range(right.shape[0]):
        rows -= torch.outer(left[:, k].to(dtype), right[k].to(dtype))
        errors.append(weighted_error(rearranged_back(rows, shape, block), problem.left, problem.right))
    return torch.stack(errors).clamp_min(0)
