"""The threshold: of all that can be, by what held-out rows lose and gain at each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from eckart.adaptive.exit_rules import entropy, find_exits
from eckart.errors import UsageError
from eckart.evaluation.tasks import correlations

CANDIDATES = 200
"""Thresholds of entropy, or tolerances, that are tried: quantiles of what the held-out rows show."""

ROUNDING = 1e-9
"""Points that sums of points may be off."""


@dataclass(frozen=True)
class ExitPoint:
    """What one threshold does to held-out rows.

    Attributes:
        threshold: of the rule.
        tolerance: of patience for numbers.
        quality: of the answers, in points: accuracy, agreement with the whole model, or correlation, times 100.
        error: one standard error of what that is below the whole model's, in points: `100 sqrt(b + c) / N`, b the rows
            of N that only the whole model has right and c those that only these answers have (McNemar 1947); 0 of a
            correlation.
        speedup: multiply-adds of the whole model for each one that is done.
        left: which part of the rows leaves at each exit; the last part stays to the end.
    """

    threshold: float
    tolerance: float | None
    quality: float
    error: float
    speedup: float
    left: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON for a report."""
        return {**vars(self), "left": list(self.left)}


def measure_quality(answers: Tensor, logits: Tensor, labels: Tensor | None, problem: str) -> float:
    """Quality of answers in points; against the whole model's logits where there are no labels.

    Args:
        answers: (N, C).
        logits: of the whole model, (N, C).
        labels: (N,) or (N, C); None for none.
        problem: as transformers calls it.
    """
    if problem == "regression":
        goal = (logits if labels is None else labels.view_as(logits)).double()
        columns = range(answers.shape[1])
        return 100 * sum(correlations(answers[:, i].double(), goal[:, i])["spearman"] for i in columns) / len(columns)
    return 100 * float(find_right(answers, logits, labels, problem).double().mean())


def find_right(answers: Tensor, logits: Tensor, labels: Tensor | None, problem: str) -> Tensor:
    """Which answers of a classifier are right, (N,) bool; arguments as of :func:`measure_quality`."""
    if problem == "multi_label_classification":
        truth = logits > 0 if labels is None else labels > 0.5
        return ((answers > 0) == truth).all(-1)
    truth = logits.argmax(-1) if labels is None else labels
    return answers.argmax(-1) == truth


def measure_standard_error(answers: Tensor, logits: Tensor, labels: Tensor | None, problem: str) -> float:
    """Standard error of the difference of two qualities, see :class:`ExitPoint`; arguments as of measure_quality."""
    if problem == "regression":
        return 0.0
    one, other = (find_right(each, logits, labels, problem) for each in (answers, logits))
    return 100 * math.sqrt(int((one != other).sum())) / len(logits)


def list_points(
    given: Sequence[Tensor],
    logits: Tensor,
    labels: Tensor | None,
    costs: Tensor,
    whole: float,
    *,
    rule: str,
    problem: str,
    candidates: Iterable[tuple[float, float | None]] | None = None,
) -> list[ExitPoint]:
    """What each threshold does, the slowest first.

    Args:
        given: logits of each exit's head, (N, C).
        logits: of the model's own head, (N, C).
        labels: (N,) or (N, C); None for none.
        costs: multiply-adds of a row that leaves at each exit, or stays to the end, (N, exits + 1).
        whole: of all rows in the model without exits.
        rule: of :mod:`eckart.adaptive.exit_rules`.
        problem: as transformers calls it.
        candidates: thresholds and tolerances; None for those that the rows show.
    """
    every = torch.stack([*given, logits])  # (exits + 1, N, C)
    rows = torch.arange(len(logits))
    points = []
    for threshold, tolerance in _candidates(given, rule, problem) if candidates is None else candidates:
        at = find_exits(given, rule=rule, threshold=threshold, problem=problem, tolerance=tolerance)
        quality = measure_quality(every[at, rows], logits, labels, problem)
        error = measure_standard_error(every[at, rows], logits, labels, problem)
        left = torch.bincount(at, minlength=len(every)).double() / len(rows)
        points.append(
            ExitPoint(threshold, tolerance, quality, error, whole / float(costs[rows, at].sum()), tuple(left.tolist()))
        )
    return sorted(points, key=lambda point: point.speedup)


def choose_point(
    points: Sequence[ExitPoint], whole: float, *, speedup: float | None, max_drop: float | None
) -> tuple[ExitPoint, str | None]:
    """The best of what reaches a speedup, or the fastest that loses no more; and a note where none does.

    Of two hundred thresholds the fastest that seems good enough is one that chance has favored, the more so the fewer
    rows there are. So one that loses no more is one that does not with a standard error added to what it loses.

    Args:
        points: from :func:`list_points`.
        whole: quality of the whole model.
        speedup: multiply-adds of the whole model for each one that is done.
        max_drop: points of quality.
    """
    if speedup is not None:
        reached = [point for point in points if point.speedup >= speedup]
        if reached:
            return max(reached, key=lambda point: (point.quality, point.speedup)), None
        fastest = max(points, key=lambda point: point.speedup)
        return fastest, f"speedup {speedup:g} is not reached: {fastest.speedup:.3g} is the most that these exits give"
    assert max_drop is not None
    kept = [point for point in points if point.quality - point.error >= whole - max_drop - ROUNDING]
    if kept:
        return max(kept, key=lambda point: (point.speedup, point.quality)), None
    best = max(points, key=lambda point: (point.quality - point.error, -point.speedup))
    return best, (
        f"every threshold may lose more than {max_drop:g} points: {whole - best.quality:.3g} with a standard error of "
        f"{best.error:.3g} is the least"
    )


def _candidates(given: Sequence[Tensor], rule: str, problem: str) -> Iterator[tuple[float, float | None]]:
    """Thresholds and tolerances to try."""
    if rule == "entropy":
        seen = torch.cat([entropy(logits, problem) for logits in given]).double()
        yield from ((value, None) for value in _between(seen))
        yield 0.0, None
        yield float(seen.max()) + 1e-3, None
        return
    if len(given) < 2:
        raise UsageError("recovery early-exit: patience compares a head with the one before it, so it needs two exits")
    for times in range(1, len(given)):
        if problem != "regression":
            yield float(times), None
            continue
        steps = torch.stack([(a - b).abs().amax(-1) for a, b in pairwise(given)]).flatten().double()
        yield from ((float(times), value) for value in _between(steps))


def _between(values: Tensor) -> list[float]:
    """Numbers between values, about as many above each as below the next: none is decided by its rounding."""
    known = values.unique()  # sorted
    chosen = torch.linspace(0, max(0, len(known) - 2), min(CANDIDATES, max(1, len(known) - 1))).long()
    return ((known[chosen] + known[(chosen + 1).clamp_max(len(known) - 1)]) / 2).tolist()
