"""Pivoted factors: the same rank-k matrix in its fewest numbers, k (m + n - k).

After Zhao et al., "Pivoting Factorization", ICML 2025 (arXiv 2501.19090): k rows of `W' = B A` are kept
as they are, the other m - k rows are a combination C of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# |C| is driven below this by row exchanges (maxvol, Goreinov et al. 2010). At 1 the volume is locally
# maximal; a little above, far fewer exchanges are needed and rounding is amplified hardly more.
MAXVOL_TOLERANCE = 1.2
# Exchanges raise the volume by at least MAXVOL_TOLERANCE each, so this is a guard, not a budget.
MAX_EXCHANGES = 2000


@dataclass(frozen=True)
class PivotedFactors:
    """`W'[order] = [I; C] P`.

    Attributes:
        pivots: P, (k, n), the rows of W' that are kept.
        rest: C, (m - k, k), what combines them into the other rows.
        order: (m,) integers: the row numbers of P's rows, then of C's rows.
        bound: max |C|, by which rounding errors of the pivot outputs are amplified at most per term.
    """

    pivots: Tensor
    rest: Tensor
    order: Tensor
    bound: float


def pivoted_factors(left: Tensor, right: Tensor) -> PivotedFactors:
    """Choose pivot rows of `W' = B A` so that C stays small, and express the other rows by them.

    Args:
        left: B, (m, k), of full column rank.
        right: A, (k, n).

    Returns:
        The pivoted factors, float64. `bound` is infinite when B has not full column rank: then W' has
        smaller rank than k and no k rows span it stably.
    """
    left, right = left.double(), right.double()
    m, k = left.shape
    # Orthonormal columns span the same space and make the pivot choice independent of how B is scaled.
    basis = torch.linalg.qr(left).Q
    _, swaps = torch.linalg.lu_factor(basis)
    order = _rows_of(swaps, m)
    chosen = basis[order[:k]]
    if not _full_rank(left):
        bound = float("inf")
        coefficients = left.new_zeros(m, k)
    else:
        coefficients = torch.linalg.solve(chosen, basis, left=False)  # (m, k), identity in the pivot rows
        order, coefficients = _exchange(order, coefficients)
        chosen = basis[order[:k]]
        coefficients = torch.linalg.solve(chosen, basis, left=False)
        bound = float(coefficients[order[k:]].abs().amax()) if m > k else 0.0
    pivots = left[order[:k]] @ right
    return PivotedFactors(pivots, coefficients[order[k:]], order, bound)


def _full_rank(left: Tensor) -> bool:
    diagonal = torch.linalg.qr(left / left.norm(dim=0).clamp_min(1e-300), mode="r").R.diagonal().abs()
    return bool(diagonal.amin() > 1e-12 * diagonal.amax())


def _rows_of(swaps: Tensor, rows: int) -> Tensor:
    """LAPACK's successive row exchanges (1-based) as one order of the rows."""
    order = list(range(rows))
    for i, j in enumerate((swaps - 1).tolist()):
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order, device=swaps.device)


def _exchange(order: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Maxvol: swap a row whose coefficient exceeds the tolerance into the pivots until none does."""
    k = coefficients.shape[1]
    order, coefficients = order.clone(), coefficients.clone()
    for _ in range(MAX_EXCHANGES):
        # Pivot rows are rows of the identity, so a larger entry is never one of theirs.
        incoming, column = divmod(int(coefficients.abs().argmax()), k)
        value = coefficients[incoming, column]
        if abs(float(value)) <= MAXVOL_TOLERANCE:
            break
        # B_p changes by one row: a rank-one update of B B_p^-1 (Sherman-Morrison).
        step = coefficients[incoming].clone()
        step[column] -= 1
        coefficients -= torch.outer(coefficients[:, column] / value, step)
        place = int((order == incoming).nonzero())
        order[place], order[column] = order[column].clone(), incoming
    return order, coefficients
