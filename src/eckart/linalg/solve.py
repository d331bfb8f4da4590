"""The one solver behind every low-rank method here.

    minimize over W' of rank k:   || L (T - W') R ||_F^2,    H = L^T L,  G = R R^T

With `L = I` the optimum is the projection `W' = U U^T T`, U the leading eigenvectors of `T G T^T`
(Eckart & Young 1936 under a metric): nothing is inverted, so it stays optimal for a singular G, fewer
tokens than features included. With both sides weighted, only the root of the SMALLER side is taken and
inverted; the larger metric is multiplied by, and decomposed only where the smaller one is singular.

One decomposition yields all ranks: factors of rank k are the first k columns and rows, and the squared
error at rank k is the tail of the squared singular values of `L T R`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.linalg.blocks import blocks
from eckart.linalg.decompose import checked_eigh, checked_svd, require_finite
from eckart.linalg.metric import Metric, Root, sandwich, weighted_error

# When both metrics are singular the smaller one is shrunk this much, and the report says so.
LAST_RESORT_SHRINKAGE = 1e-8

ORDINARY = (1e-15, 1e15)
"""The largest number of a weight whose Gram float32 can hold; others are brought there by a power of two."""


@dataclass(frozen=True)
class Problem:
    """A target and the metric its error is measured in.

    Attributes:
        target: T, (m, n), usually the weight itself.
        left: metric of the outputs, (m, m).
        right: metric of the inputs, (n, n).
    """

    target: Tensor
    left: Metric = Metric()
    right: Metric = Metric()

    @property
    def mirrored(self) -> Problem:
        """The same problem, transposed."""
        return Problem(self.target.mT, self.right, self.left)


Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Factorization:
    """Optimal factors of every rank at once, or of the ranks up to a limit.

    Attributes:
        seen_factors: B (m, s) and A (s, n), s the number of directions that the metric sees; the first k columns of B
            and rows of A belong to rank k.
        squared: (r,) squared singular values of `L T R`, r = min(m, n), descending, float64.
        notes: fallbacks taken on the way, for the report.
        completion: makes B (m, r) and A (r, n), where s < r; a plain SVD that most ranks never need. None where the
            factors are of full size, or were cut by :meth:`kept`.
    """

    seen_factors: Factors
    squared: Tensor
    notes: tuple[str, ...] = ()
    completion: Callable[[], Factors] | None = None

    @cached_property
    def factors(self) -> Factors:
        """B (m, r) and A (r, n): of full size, so that `B A = T`; of a limited one, all that there is."""
        return self.seen_factors if self.completion is None else self.completion()

    @property
    def left(self) -> Tensor:
        """B, (m, r); its first k columns belong to rank k."""
        return self.factors[0]

    @property
    def right(self) -> Tensor:
        """A, (r, n); its first k rows belong to rank k."""
        return self.factors[1]

    def truncated(self, rank: int) -> Factors:
        """The optimal factors `B (m, rank)` and `A (rank, n)` with `W' = B A`.

        Raises:
            UsageError: if there are no factors of that rank.
        """
        left, right = self.seen_factors if rank <= self.seen_factors[0].shape[1] else self.factors
        if rank > len(right):
            raise UsageError(
                f"rank {rank}: the factors of this {left.shape[0]} x {right.shape[1]} weight were kept up to rank "
                f"{len(right)}. Ask for no more, or factor the weight again with a larger limit."
            )
        return left[:, :rank], right[:rank]

    def kept(self, limit: int) -> Factorization:
        """The same for ranks up to `limit` alone, in memory of its own; `squared`, and so the curve, stays whole."""
        left, right = self.truncated(min(limit, len(self.squared)))
        own = torch.contiguous_format
        return Factorization(
            (left.clone(memory_format=own), right.clone(memory_format=own)), self.squared.clone(), self.notes
        )

    @property
    def curve(self) -> Tensor:
        """(r + 1,) squared weighted error at rank 0, 1, ..., r; the last entry is 0."""
        tail = self.squared.flip(0).cumsum(0).flip(0)
        return torch.cat([tail, tail.new_zeros(1)])

    @property
    def effective_rank(self) -> float:
        """`exp(entropy)` of the normalized squared singular values (Roy & Vetterli 2007)."""
        share = self.squared / self.squared.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))

    def changed(self, change: Callable[[Tensor, Tensor], Factors], notes: tuple[str, ...] = ()) -> Factorization:
        """The factorization whose factors are `change(B, A)`."""
        completion = self.completion
        later = None if completion is None else lambda: change(*completion())
        return Factorization(change(*self.seen_factors), self.squared, notes + self.notes, later)

    @property
    def mirrored(self) -> Factorization:
        """The factorization of the transposed problem."""
        return self.changed(lambda left, right: (right.mT, left.mT))


def factorize(problem: Problem, what: str = "weight") -> Factorization:
    """Solve the weighted low-rank problem for every rank.

    Args:
        problem: target and metrics. Products run in the target's precision (float32 at least),
            decompositions in float64.
        what: the site's name, used in errors and notes.

    Returns:
        The optimal factors and the squared singular values of `L T R`.

    Raises:
        NumericalError: if the target or a metric is not finite, or nothing converges.
    """
    require_finite(problem.target, what)
    target = problem.target.to(torch.promote_types(problem.target.dtype, torch.float32))
    if (scale := _unusual_scale(target)) != 1.0:
        found = factorize(Problem(target / scale, problem.left, problem.right), what)
        found = found.changed(lambda left, right: (left * scale, right))
        return replace(found, squared=found.squared * scale**2)
    problem = Problem(target, problem.left, problem.right)
    if problem.left.is_identity:
        return _project(problem.target, problem.right, what)
    if problem.right.is_identity:
        return _project(problem.target.mT, problem.left, what).mirrored
    if problem.left.diagonal is not None:
        return _rescaled(problem, what)
    if problem.right.diagonal is not None:
        return _rescaled(problem.mirrored, what).mirrored
    return _smaller_inverted(problem, what)


def _unusual_scale(target: Tensor) -> float:
    """A power of two near the largest number, where its square would overflow or vanish in float32; else 1."""
    low, high = torch.aminmax(target)
    largest = max(-float(low), float(high))
    return 1.0 if ORDINARY[0] < largest < ORDINARY[1] or largest == 0 else 2.0 ** math.floor(math.log2(largest))


def _project(target: Tensor, right: Metric, what: str) -> Factorization:
    """`L = I`: orthonormal B, `A = B^T T`."""
    m, n = target.shape
    if m <= n:
        squared, basis, notes = checked_eigh(sandwich(right, target.mT), what)
        basis = basis[:, : _seen(squared, target)].to(target.dtype)
    else:
        root = right.root(f"{what}: input metric", inverted=False).to(target.dtype)
        squared, directions, notes = checked_eigh(_gram(root.right_of(target)), what)
        directions = directions[:, : _seen(squared, target)].to(target.dtype)
        # T C is made twice, so that it need not be held through the decomposition.
        basis = torch.linalg.qr(target @ root.times(directions)).Q
        notes = root.notes + notes
    missing = min(m, n) - basis.shape[1]
    completion = partial(_complete, basis, missing, target, what) if missing else None
    return Factorization((basis, basis.mT @ target), squared, notes, completion)


def _gram(matrix: Tensor) -> Tensor:
    return matrix.mT @ matrix


def _seen(squared: Tensor, target: Tensor) -> int:
    """How many directions stand above the rounding of the products that `squared` was computed from."""
    floor = 4 * torch.finfo(target.dtype).eps
    return int((squared > floor * squared[0]).sum())


def _complete(seen: Tensor, missing: int, target: Tensor, what: str) -> Factors:
    """Add the directions that the metric does not see: the plain SVD of what is left of T.

    Without them, a tall T under a singular G would lose up to half of itself at full size.
    """
    rest, *_ = checked_svd(target - seen @ (seen.mT @ target), what)
    # QR, because singular vectors of a zero singular value need not be orthogonal to `seen`.
    basis = torch.linalg.qr(torch.cat([seen, rest[:, :missing].to(seen.dtype)], dim=1)).Q
    # It may flip signs: the seen columns stay as they are, so that every rank is a truncation of the next.
    basis = torch.cat([seen, basis[:, seen.shape[1] :]], dim=1)
    return basis, basis.mT @ target


def _rescaled(problem: Problem, what: str) -> Factorization:
    """A diagonal left metric: scale the rows, solve with `L = I`, scale back."""
    root = problem.left.root(f"{what}: output metric")
    return _whitened(problem, root, what) if root.invertible else _smaller_inverted(problem, what)


def _whitened(problem: Problem, root: Root, what: str) -> Factorization:
    """Solve for `L T` with `L = I`, and take the answer back through `L^-1`; `L = C^T`, C the root of H."""
    root = root.to(problem.target.dtype)
    solved = _project(root.right_of(problem.target.mT).mT, problem.right, what)
    return solved.changed(lambda left, right: (root.solve_right(left.mT).mT, right), root.notes)


def _smaller_inverted(problem: Problem, what: str) -> Factorization:
    """Both sides weighted: the smaller one is inverted."""
    rows, columns = problem.target.shape
    return _two_sided(problem.mirrored, what).mirrored if rows < columns else _two_sided(problem, what)


def _two_sided(problem: Problem, what: str) -> Factorization:
    """Both sides weighted, m >= n: `W' = T C V V^T C^-1`, `C C^T = G`, V of `C^T T^T H T C`."""
    target, left, right = problem.target, problem.left, problem.right
    notes: tuple[str, ...] = ()
    root = right.root(f"{what}: input metric")
    if not root.invertible:
        other = left.root(f"{what}: output metric")
        if other.invertible:  # nothing else need be
            return _whitened(problem, other, what)
        right = right.shrunk(LAST_RESORT_SHRINKAGE)
        root = right.root(f"{what}: input metric")
        notes = (f"{what}: a singular metric was shrunk by {LAST_RESORT_SHRINKAGE:g} to be inverted",)
    if not root.invertible:  # a zero metric: no error counts, so the other metric alone chooses the factors
        solved = _project(target.mT, left, what).mirrored
        note = f"{what}: its metric is zero, so every rank has the predicted error 0"
        return replace(solved, squared=torch.zeros_like(solved.squared), notes=(note, *solved.notes))
    root = root.to(target.dtype)
    squared, directions, more = checked_eigh(sandwich(left, root.right_of(target)), what)
    directions = directions.to(target.dtype)
    # T C is made twice, so that it need not be held through the decomposition.
    factors = (target @ root.times(directions), root.solve_right(directions.mT))
    return Factorization(factors, squared, root.notes + notes + more)


def curve_under(solved: Factorization, problem: Problem) -> Tensor:
    """Squared error of each truncation of `solved`, measured in another problem's metric.

    Makes the errors of any method comparable across sites: solve in its own metric, measure in one that has
    the unit of the loss.

    Args:
        solved: factors B (m, r) and A (r, n).
        problem: target and the metrics H, G to measure in.

    Returns:
        (r + 1,) `tr(H E_k G E_k^T)`, `E_k = T - B_k A_k`, for k = 0 .. r, float64, clamped at 0.
    """
    dtype = torch.promote_types(problem.target.dtype, solved.left.dtype)
    target, left, right = problem.target.to(dtype), solved.left.to(dtype), solved.right.to(dtype)
    changes = [weighted_error(target, problem.left, problem.right)[None]]  # then from rank k - 1 to rank k
    for part in blocks(left.shape[1]):
        weighted_left = problem.left.times(left[:, part])  # (m, b), H B
        weighted_right = problem.right.times(right[part].mT)  # (n, b), G A^T
        cross = (weighted_left * (target @ weighted_right)).sum(0).double()  # of diag(B^T H T G A^T)
        # (B^T H B) * (A G A^T), symmetric: direction k meets itself once and each one before it twice.
        pairs = (left[:, : part.stop].mT @ weighted_left).double() * (right[: part.stop] @ weighted_right).double()
        before = torch.triu(pairs, 1 - part.start).sum(0)
        changes.append(2 * before + pairs[part].diagonal() - 2 * cross)
    return torch.cat(changes).cumsum(0).clamp_min(0)
