"""Factors of an embedding matrix, for look-ups alone or for a tied output layer as well.

Looking a row up is a product with a one-hot input, so that the metric of the look-ups is diagonal over the vocabulary,
with the tokens' frequencies on it, and

    minimize over E' of rank k:   || D^(1/2) (E - E') ||_F^2                                                     (1)

is the one-sided problem of :func:`eckart.linalg.factorize`, solved exactly. A tied head multiplies the same matrix with
the last hidden states h, and its error `|| (E - E') H^(1/2) ||_F^2`, H = E[h h^T], joins as a sum,

    f(E') = || D^(1/2) (E - E') ||_F^2 + lambda || P^(1/2) (E - E') H^(1/2) ||_F^2                               (2)

which is no two-sided product: no decomposition gives its minimum. Given one factor the other one is solved exactly,
so the two are solved in turn and f never rises. The result is approximate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.linalg.decompose import checked_eigh, require_finite
from eckart.linalg.metric import Metric, weighted_error
from eckart.linalg.solve import Factors, Problem, factorize

ROUNDS = 30
SMALLEST_FALL = 1e-4
"""Relative to f: the alternation ends when a round gains less."""

# Of the eigenvalues of the small systems, relative: smaller ones belong to directions that the factors do not have.
FLOOR = 1e-12


@dataclass(frozen=True)
class TableFactors:
    """`E' = left @ right` of one rank, and what it costs.

    Attributes:
        left: B, (v, k), a row for each token.
        right: A, (k, d).
        lookup_error: `|| D^(1/2) (E - E') ||^2 / || D^(1/2) E ||^2`.
        head_error: the same of the head's term; None without a head.
        history: f relative to f(0)'s first term after each round, falling; one entry where (1) was solved exactly.
        notes: fallbacks taken.
    """

    left: Tensor
    right: Tensor
    lookup_error: float
    head_error: float | None
    history: tuple[float, ...]
    notes: tuple[str, ...] = ()


def smoothed(counts: Tensor) -> Tensor:
    """Token frequencies with one added to every count (Laplace), so that no token has weight zero.

    Args:
        counts: (v,) how often each token was seen.

    Returns:
        (v,) float64, summing to 1.
    """
    counts = counts.double() + 1
    return counts / counts.sum()


def table_factors(table: Tensor, lookups: Tensor, rank: int, what: str = "embedding") -> TableFactors:
    """Solve (1) exactly.

    Args:
        table: E, (v, d).
        lookups: diagonal of D, (v,), positive.
        rank: k.
        what: the matrix's name in errors and notes.

    Raises:
        NumericalError: if the table is not finite, or nothing converges.
    """
    table = _precise(table)
    solved = factorize(Problem(table, left=Metric(diagonal=lookups)), what)
    left, right = solved.truncated(rank)
    error = _share(table, left, right, Metric(diagonal=lookups), Metric())
    return TableFactors(left, right, error, None, (error,), solved.notes)


def tied_factors(
    table: Tensor,
    lookups: Tensor,
    inputs: Tensor,
    rank: int,
    *,
    outputs: Tensor | None = None,
    balance: float = 1.0,
    what: str = "embedding",
) -> TableFactors:
    """Approximate the minimum of (2) by alternation; never worse than the solution of (1).

    Both steps are exact. With A fixed, row i solves `b_i A M_i A^T = e_i M_i A^T`, `M_i = D_i I + lambda P_i H`, and
    one basis makes `A A^T` the identity and `A H A^T` diagonal for all rows at once. With B fixed,
    `B^T D B A + lambda B^T P B A H = B^T D E + lambda B^T P E H` separates in the eigenvectors of H and a basis that
    diagonalizes both Grams of B.

    Args:
        table: E, (v, d).
        lookups: diagonal of D, (v,), positive.
        inputs: H, (d, d), the second moment of what the head multiplies.
        rank: k.
        outputs: diagonal of P, (v,); None for the identity: every logit counts the same.
        balance: of the second term against the first, each relative to its value at E' = 0; lambda is made from it.
        what: the matrix's name in errors and notes.

    Raises:
        NumericalError: if a matrix is not finite, or nothing converges.
    """
    table = _precise(table)
    require_finite(inputs, f"{what}: inputs of the head")
    weights, head = Metric(diagonal=lookups), Metric(full=inputs.to(table.dtype))
    rows = Metric() if outputs is None else Metric(diagonal=outputs)
    first, second = float(weighted_error(table, weights, Metric())), float(weighted_error(table, rows, head))
    start = table_factors(table, lookups, rank, what)
    if first == 0 or second == 0:
        return TableFactors(start.left, start.right, start.lookup_error, 0.0, start.history, start.notes)
    strength = balance * first / second
    D = lookups.to(table.dtype)
    P = strength * (torch.ones_like(D) if outputs is None else outputs.to(table.dtype))
    H = head.dense(torch.float64)
    values, vectors, notes = checked_eigh(H, f"{what}: inputs of the head")
    seen = table @ head.dense(table.dtype)  # E H

    def objective(factors: Factors) -> float:
        error = table - factors[0] @ factors[1]
        return (
            float(weighted_error(error, weights, Metric())) + strength * float(weighted_error(error, rows, head))
        ) / first

    best = start.left, start.right
    history = [objective(best)]
    # Where both terms weigh the rows alike, the first of these is (2) itself, solved exactly.
    joint = Metric(full=H, scale=float(P.mean() / D.mean()), ridge=1.0)
    for begin in (Problem(table, weights, joint), Problem(table, rows, head)):
        candidate = factorize(begin, what).truncated(rank)
        if (value := objective(candidate)) < history[-1]:
            best = candidate
            history.append(value)
    for _ in range(ROUNDS):
        left = _codes(table, seen, best[1], D, P, head)
        right = _basis(table, seen, left, D, P, values, vectors)
        value = objective((left, right))
        if not value < history[-1]:  # nothing but rounding is left
            break
        fell = history[-1] - value
        best = left, right
        history.append(value)
        if fell < SMALLEST_FALL * value:
            break
    lookup = _share(table, *best, weights, Metric())
    return TableFactors(*best, lookup, _share(table, *best, rows, head), tuple(history), start.notes + notes)


def in_blocks(
    table: Tensor, lookups: Tensor, inputs: Tensor | None, blocks: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cut each row into blocks: a Kronecker product of one row becomes a matrix of rank one.

    `A (x) b` with A (v, c) and b (1, f) is, its rows cut into c blocks of f numbers, the outer product of the numbers
    of A and b (Van Loan & Pitsianis 1993). A block's look-ups are its row's. The head's metric couples the blocks;
    the mean of its diagonal blocks stands for it.

    Args:
        table: E, (v, c f).
        lookups: (v,).
        inputs: H, (c f, c f), or None.
        blocks: c.

    Returns:
        The table (v c, f), its weights (v c,), and the mean block (f, f) of H or None.
    """
    width = table.shape[1] // blocks
    mean = None
    if inputs is not None:
        mean = inputs.reshape(blocks, width, blocks, width).diagonal(dim1=0, dim2=2).mean(-1)
    return table.reshape(-1, width), lookups.repeat_interleave(blocks), mean


def _precise(table: Tensor) -> Tensor:
    return table.detach().to(torch.promote_types(table.dtype, torch.float32))


def _share(table: Tensor, left: Tensor, right: Tensor, outer: Metric, inner: Metric) -> float:
    """Squared error relative to the squared table, both weighted."""
    whole = float(weighted_error(table, outer, inner))
    return float(weighted_error(table - left @ right, outer, inner)) / whole if whole else 0.0


def _jointly_diagonal(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """W (k, s) with `W^T first W = I` and `W^T second W = diag(values)`; what `first` does not see is left out."""
    values, vectors, _ = checked_eigh(first)
    seen = values > values[0] * FLOOR
    basis = (vectors[:, seen] / values[seen].sqrt()).to(first.dtype)
    inner, turn, _ = checked_eigh(basis.mT @ second @ basis)
    return basis @ turn.to(first.dtype), inner


def _codes(table: Tensor, seen: Tensor, right: Tensor, D: Tensor, P: Tensor, head: Metric) -> Tensor:
    """B, (v, k), for a fixed A."""
    basis, values = _jointly_diagonal(
        right.double() @ right.mT.double(), right.double() @ head.times(right.mT).double()
    )
    mixed = right.mT @ basis.to(table.dtype)  # (d, s)
    wanted = D[:, None] * (table @ mixed) + P[:, None] * (seen @ mixed)
    return wanted / (D[:, None] + P[:, None] * values.to(table.dtype)) @ basis.to(table.dtype).mT


def _basis(table: Tensor, seen: Tensor, left: Tensor, D: Tensor, P: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """A, (k, d), for a fixed B; `H = vectors diag(values) vectors^T`."""
    for_lookups, for_head = D[:, None] * left, P[:, None] * left
    basis, shares = _jointly_diagonal((left.mT @ for_lookups).double(), (left.mT @ for_head).double())
    wanted = (for_lookups.mT @ table + for_head.mT @ seen).double()  # C
    solved = (basis.mT @ wanted @ vectors.double()) / (1 + shares[:, None] * values)
    return (basis @ solved @ vectors.double().mT).to(table.dtype)
