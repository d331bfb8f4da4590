"""Scores of predictions against gold labels: accuracy, F1, Matthews, Pearson, Spearman."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def confusion(gold: Sequence[int], predicted: Sequence[int], classes: int) -> Tensor:
    """Count pairs of gold and predicted class.

    Args:
        gold: Gold classes.
        predicted: Predicted classes; any number outside 0..classes-1 is a wrong answer that is no class.
        classes: Number of classes.

    Returns:
        Counts (classes, classes + 1), float64: gold by predicted, no class last.
    """
    counts = torch.zeros(classes, classes + 1, dtype=torch.float64)
    for truth, guess in zip(gold, predicted, strict=True):
        counts[truth, guess if 0 <= guess < classes else classes] += 1
    return counts


def accuracy(counts: Tensor) -> float:
    """Return the share of right answers.

    Args:
        counts: What `confusion` gave.

    Returns:
        Between 0 and 1.
    """
    return float(counts.diagonal().sum() / counts.sum())


def f1_scores(counts: Tensor) -> list[float]:
    """Return each class's F1, 2 TP / (2 TP + FP + FN), 0 for a class that neither side has.

    Args:
        counts: What `confusion` gave.

    Returns:
        One score a class.
    """
    hits = counts.diagonal()
    total = counts.sum(1) + counts[:, :-1].sum(0)
    return [float(2 * hit / both) if both else 0.0 for hit, both in zip(hits, total, strict=True)]


def f1_macro(counts: Tensor) -> float:
    """Return the mean F1 of the classes that are in the gold or the predicted labels.

    Args:
        counts: What `confusion` gave.

    Returns:
        Between 0 and 1.
    """
    present = counts.sum(1) + counts[:, :-1].sum(0) > 0
    scores = [score for score, there in zip(f1_scores(counts), present, strict=True) if there]
    return sum(scores) / len(scores)


def matthews(counts: Tensor) -> float:
    """Return Matthews' correlation for any number of classes (Gorodkin 2004), 0 where one side is constant.

    Args:
        counts: What `confusion` gave.

    Returns:
        Between -1 and 1.
    """
    gold, predicted, total = counts.sum(1), counts.sum(0), counts.sum()
    covariance = counts.diagonal().sum() * total - gold @ predicted[:-1]
    spread = (total**2 - predicted @ predicted) * (total**2 - gold @ gold)
    return float(covariance / spread.sqrt()) if spread > 0 else 0.0


def pearson(first: Tensor, second: Tensor) -> float:
    """Return the linear correlation.

    Args:
        first: Numbers (N,).
        second: Numbers (N,).

    Returns:
        Between -1 and 1; NaN where a side is constant or not finite.
    """
    a, b = first.double() - first.double().mean(), second.double() - second.double().mean()
    spread = float(a.norm() * b.norm())
    return float(a @ b) / spread if spread and math.isfinite(spread) else math.nan


def spearman(first: Tensor, second: Tensor) -> float:
    """Return the correlation of ranks; equal numbers share their mean rank.

    Args:
        first: Numbers (N,).
        second: Numbers (N,).

    Returns:
        Between -1 and 1; NaN where a side is constant or not finite.
    """
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        return math.nan
    return pearson(ranks(first), ranks(second))


def ranks(values: Tensor) -> Tensor:
    """Rank numbers from 1.

    Args:
        values: Numbers (N,).

    Returns:
        Ranks (N,), float64; equal numbers get the mean of the ranks that they take up.
    """
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]
