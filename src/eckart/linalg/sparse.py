"""Low-rank + sparse: splitting a weight, and pruning the sparse part while it trains.

The split is the bilateral one of GreBsmo (Zhou & Tao 2013), which DSEE uses (Chen et al. 2021, arXiv 2111.00160); the
schedule, the importance and the threshold are LoSparse's (Li et al. 2023, arXiv 2306.11222).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.linalg.decompose import require_finite


@dataclass(frozen=True)
class Split:
    """`W = left @ right + S + residual`, S sparse.

    Attributes:
        left: (m, k), orthonormal columns.
        right: (k, n).
        positions: (count,) int64, ascending: where S is not zero, as `row * n + column`.
        values: (count,) S there.
        history: `|| W - left right - S ||_F` after each round; it never rises.
    """

    left: Tensor
    right: Tensor
    positions: Tensor
    values: Tensor
    history: tuple[float, ...]


def low_rank_sparse_split(weight: Tensor, rank: int, count: int, rounds: int = 100, what: str = "weight") -> Split:
    """Greedy bilateral split: `min || W - U V - S ||_F` with `rank(U V) <= rank` and `count` entries in S.

    Each round adds a few directions to V, so that all are there in the last one: rows of the residual, the largest
    first, after one power step. Then U spans `(W - S) V^T`, `V = U^T (W - S)`, and S is the residual where it is
    largest. No step can raise the residual, and nothing is drawn at random.

    Args:
        weight: W, (m, n); computed in float32 at least.
        rank: of U V, at most min(m, n); 0 for none.
        count: entries of S, at most m n.
        rounds: of growth.
        what: the weight's name in errors.

    Raises:
        UsageError: for a rank, a count or a number of rounds that is out of range.
        NumericalError: if the weight is not finite.
    """
    rows, columns = weight.shape
    if not 0 <= rank <= min(rows, columns) or not 0 <= count <= rows * columns or rounds < 1:
        raise UsageError(
            f"{what}: a split of {rows} x {columns} into rank {rank} and {count} entries in {rounds} rounds cannot be; "
            f"choose a rank of 0..{min(rows, columns)}, 0..{rows * columns} entries and 1 round or more."
        )
    require_finite(weight, what)
    target = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    flat = target.flatten()
    left, right = target.new_zeros(rows, 0), target.new_zeros(0, columns)
    positions, values = _largest(flat, count)
    sparse = _scattered(target, positions, values)
    history = []
    for step in range(1, rounds + 1):
        rest = target - sparse
        residual = rest - left @ right
        new = math.ceil(rank * step / rounds) - len(right)
        if new:
            largest = residual.square().sum(1).topk(new).indices.sort().values
            directions = residual[largest]
            power = (directions @ residual.mT) @ residual
            right = torch.cat([right, power / power.norm(dim=1, keepdim=True).clamp_min(_tiny(power))])
        if len(right):
            left = torch.linalg.qr(rest @ right.mT).Q
            right = left.mT @ rest
            residual = target - left @ right
        else:
            residual = target
        positions, values = _largest(residual.flatten(), count)
        sparse = _scattered(target, positions, values)
        history.append(float((residual - sparse).norm()))
    return Split(left, right, positions, values, tuple(history))


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny


def _largest(flat: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The entries of largest magnitude: positions in ascending order, and values."""
    positions = flat.abs().topk(count).indices.sort().values
    return positions, flat[positions]


def _scattered(like: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    return torch.zeros_like(like).flatten().scatter(0, positions, values).view_as(like)


# -- pruning while training -----------------------------------------------------------------------------


def cubic_fraction(step: int, total: int, warmup: float, final: float, target: float) -> float:
    """What is kept after `step` of `total` steps: 1, then `t + (1 - t) (1 - x)^3`, then t (arXiv 2306.11222, eq. 6).

    Args:
        step: 0..total.
        total: steps of the training.
        warmup: fraction of the steps before anything is pruned.
        final: fraction of the steps at the end in which nothing more is pruned.
        target: t, the fraction kept in the end; x runs from 0 to 1 between the two phases.

    Raises:
        UsageError: if the phases overlap, or a fraction is outside 0..1.
    """
    if not (warmup >= 0 and final >= 0 and warmup + final <= 1 and 0 <= target <= 1):
        raise UsageError(
            f"pruning schedule: warm-up {warmup:g} and final phase {final:g} must be 0 or more and not "
            f"overlap, and the kept fraction {target:g} must be in 0..1."
        )
    begin, end = warmup * total, (1 - final) * total
    if step >= end:
        return target
    if step <= begin:
        return 1.0
    x = (step - begin) / (end - begin)
    return target + (1 - target) * (1 - x) ** 3


def averaged_importance(previous: Tensor | None, terms: Tensor, beta: float = 0.85) -> Tensor:
    """`beta I + (1 - beta) J` with J the mean of `|p grad|` over the steps since the last update (eq. 7, 8).

    Args:
        previous: I, or None at the first update: I starts at 0, as in the paper.
        terms: J.
        beta: of the exponential average.
    """
    return (1 - beta) * terms if previous is None else beta * previous + (1 - beta) * terms


def rows_above(scores: Sequence[Tensor], alive: Sequence[Tensor], costs: Sequence[int], budget: int) -> list[Tensor]:
    """Choose the rows of several matrices that stay, by one threshold over all of them.

    Rows are taken from the best score down until the first that the budget cannot hold. A row that is gone does not
    come back. Equal scores: the earlier matrix, then the earlier row.

    Args:
        scores: (m_i,) for each matrix.
        alive: (m_i,) bool: rows that are still there.
        costs: what one row of each matrix costs.
        budget: what all rows that stay may cost.

    Returns:
        (m_i,) bool for each matrix: a subset of `alive`.
    """
    sizes = [len(score) for score in scores]
    there = torch.cat([mask.cpu() for mask in alive])
    every = torch.cat([score.detach().double().cpu() for score in scores])
    cost = torch.cat([torch.full((size,), price, dtype=torch.int64) for size, price in zip(sizes, costs, strict=True)])
    order = every.masked_fill(~there, -math.inf).argsort(descending=True, stable=True)[: int(there.sum())]
    kept = order[cost[order].cumsum(0) <= budget]
    mask = torch.zeros(len(every), dtype=torch.bool)
    mask[kept] = True
    return [part.to(old.device) for part, old in zip(mask.split(sizes), alive, strict=True)]


def smallest_masked(weights: Sequence[Tensor], fraction: float) -> tuple[list[Tensor], float]:
    """One magnitude threshold over several matrices: masks of what stays, and the threshold.

    Args:
        weights: any shapes.
        fraction: of all numbers that goes, in 0..1; ties at the threshold go too.

    Returns:
        Masks (True: stays), and the largest magnitude that goes (-1 if none).
    """
    sizes = torch.cat([weight.detach().abs().flatten().float().cpu() for weight in weights])
    count = int(fraction * len(sizes))
    threshold = float(sizes.kthvalue(count).values) if count else -1.0
    return [weight.detach().abs() > threshold for weight in weights], threshold
