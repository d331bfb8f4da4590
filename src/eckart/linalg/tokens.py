"""Which tokens of a text a model goes on with: what each one matters, which are kept, and how many.

A layer's attention says how much every token is looked at. PoWER-BERT (Goyal et al. 2020, ICML) keeps the most looked
at, as many as a schedule says; LTP (Kim et al. 2022, KDD) keeps those above a threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGEST = 2.0**12
"""Parameters of schedules are not sought beyond."""


def significance(attention: Tensor, real: Tensor) -> Tensor:
    """The attention that each token receives: `s_j = sum_h sum_i A_h[i, j]` over heads h and real queries i.

    Args:
        attention: rows that sum to 1, (B, heads, T, T), queries before keys.
        real: (B, T) bool, False for padding.

    Returns:
        (B, T), in float32 at least; 0 for padding.
    """
    maps = attention.to(torch.promote_types(attention.dtype, torch.float32))
    queries = real.to(maps)
    received = (queries[:, None, None] @ maps).sum((1, 2))  # (B, 1, 1, T) (B, heads, T, T): the maps are read once
    return received * queries


def relative(scores: Tensor, real: Tensor) -> Tensor:
    """Scores (B, T) as multiples of their mean over a row's real tokens, so that one threshold fits every length."""
    mean = (scores * real.to(scores)).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return scores / mean.clamp_min(torch.finfo(scores.dtype).tiny)


def count_kept(lengths: Tensor, fraction: float) -> Tensor:
    """Tokens that are kept of rows of some lengths (B,): `fraction` of them, rounded, 1 at least."""
    return torch.minimum((lengths * fraction + 0.5).floor().long().clamp_min(1), lengths)


def keep_most(scores: Tensor, real: Tensor, counts: Tensor, always: Tensor | None = None) -> Tensor:
    """Keep the tokens with the largest scores.

    Args:
        scores: (B, T).
        real: (B, T) bool; what is not real goes first.
        counts: (B,), how many to keep; all of `always` are, even if they are more.
        always: (B, T) bool, tokens that stay whatever their score.

    Returns:
        (B, T) bool. Of equal scores the earlier token stays.
    """
    ordered = scores.masked_fill(~real, -torch.inf)
    if always is not None:
        ordered = ordered.masked_fill(always & real, torch.inf)
        counts = torch.maximum(counts, (always & real).sum(1))
    order = ordered.argsort(dim=1, descending=True, stable=True)
    best = torch.arange(real.shape[1], device=real.device)[None] < counts[:, None]
    return torch.zeros_like(real).scatter(1, order, best) & real


def keep_above(scores: Tensor, real: Tensor, threshold: float, always: Tensor | None = None) -> Tensor:
    """Keep the tokens whose score is at least a threshold, and the best of every row.

    Args:
        scores: (B, T).
        real: (B, T) bool.
        threshold: of the scores.
        always: (B, T) bool, tokens that stay whatever their score.

    Returns:
        (B, T) bool.
    """
    kept = (scores >= threshold) & real
    if always is not None:
        return kept | (always & real)
    best = scores.masked_fill(~real, -torch.inf).argmax(1, keepdim=True)
    return kept | (torch.zeros_like(real).scatter(1, best, value=True) & real)


def soft_keep(scores: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """LTP's mask while thresholds are learned: `sigmoid((s - threshold) / temperature)`, in (0, 1)."""
    return torch.sigmoid((scores - threshold) / temperature)


def soft_extract(scores: Tensor, real: Tensor, retention: Tensor) -> Tensor:
    """PoWER-BERT's mask while the schedule is learned: the k-th most looked at token is multiplied by `r_k`.

    Rows have different lengths, so k counts in parts of a row: of P parameters the k-th (from 0) of n tokens gets that
    at place `(k + 1/2) P / n`.

    Args:
        scores: (B, T).
        real: (B, T) bool.
        retention: (P,), in [0, 1].

    Returns:
        (B, T); gradients pass to `retention`, 1 for padding.
    """
    ordered = scores.masked_fill(~real, -torch.inf)
    place = ordered.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    lengths = real.sum(1, keepdim=True).clamp_min(1)
    at = ((place + 0.5) * len(retention) / lengths).floor().long().clamp_max(len(retention) - 1)
    return torch.where(real, retention[at], retention.new_ones(()))


def retained_fractions(retention: Tensor) -> list[float]:
    """A schedule from learned retention parameters: `f_l = min(f_{l-1}, sum_k r_lk / P)`.

    Args:
        retention: (blocks, P), in [0, 1].

    Returns:
        For each block the fraction of a row's tokens that are left after it; it never rises.
    """
    return retention.double().mean(1).cummin(0).values.tolist()


def pick(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Where the kept tokens of each row stand, side by side, so that they can be gathered.

    Args:
        kept: (B, T) bool.

    Returns:
        Places (B, K), K the most that a row keeps: those of kept tokens in their order, then other places of the row,
        each at most once; and (B, K) bool, True for kept ones.
    """
    counts = kept.sum(1)
    widest = int(counts.max()) if len(counts) else 0
    places = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :widest]
    return places, torch.arange(widest, device=kept.device)[None] < counts[:, None]


def reach(
    at: Callable[[float], list[float]], cost: Callable[[list[float]], float], wished: float, halvings: int = 40
) -> list[float]:
    """The schedule of a family that costs what is wished: its parameter is found by bisection.

    Args:
        at: parameter from 0 on -> schedule; a larger parameter costs no more.
        cost: of a schedule.
        wished: the cost to reach.
        halvings: of the interval that the parameter is in.

    Returns:
        The schedule of the smallest parameter that is found to cost at most `wished`; where none does, that of a
        very large one.
    """
    low, high = 0.0, 1.0
    while cost(at(high)) > wished and high < LARGEST:
        low, high = high, 2 * high
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) > wished else (low, middle)
    return at(high)


def bent(shape: Sequence[float]) -> Callable[[float], list[float]]:
    """The family `f_l = g_l^p` of a shape g, fractions that do not rise: p = 1 is g itself, 0 keeps everything."""
    return lambda power: [fraction**power for fraction in shape]


def raised(thresholds: Sequence[float]) -> Callable[[float], list[float]]:
    """The family `t_l = max(0, g_l - max(g) + c)` of thresholds g: c = max(g) is g itself, 0 keeps everything."""
    highest = max(thresholds)
    return lambda shift: [max(0.0, threshold - highest + shift) for threshold in thresholds]
