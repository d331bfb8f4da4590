"""When a row may leave at an exit: pure functions of the answers that the heads give, one exit after another.

Entropy (DeeBERT: Xin et al., ACL 2020): a row leaves where `H(p) = - sum_c p_c log p_c < threshold`, in nats, p the
head's probabilities; of several labels that do not exclude each other, the mean of their binary entropies.

Patience (PABEE: Zhou et al., NeurIPS 2020): a row leaves once `threshold` heads in a row have given the answer of the
head before them: the same class, the same labels, or numbers that differ by less than a tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

RULES = ("entropy", "patience")


@dataclass
class Answers:
    """What the rule knows of the exits before.

    Attributes:
        last: answers of the last head, (N, C); None before the first exit.
        streak: how many heads in a row have agreed with the one before them, (N,).
    """

    last: Tensor | None
    streak: Tensor

    @classmethod
    def none(cls, rows: int, device: torch.device | str = "cpu") -> Answers:
        """Before the first exit."""
        return cls(None, torch.zeros(rows, dtype=torch.long, device=device))

    def of(self, rows: Tensor) -> Answers:
        """Those of some rows; (r,) bool or numbers."""
        return Answers(None if self.last is None else self.last[rows], self.streak[rows])


def entropy(logits: Tensor, problem: str) -> Tensor:
    """How unsure each answer is, in nats, (N,).

    Args:
        logits: (N, C).
        problem: as transformers calls it; a regression has no entropy.
    """
    if problem == "multi_label_classification":
        p = logits.float().sigmoid()
        return functional.binary_cross_entropy(p, p, reduction="none").mean(-1)
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def agree(one: Tensor, other: Tensor, problem: str, tolerance: float | None) -> Tensor:
    """Whether two heads give the same answers, (N,) bool.

    Args:
        one: (N, C).
        other: (N, C).
        problem: as transformers calls it.
        tolerance: of numbers.
    """
    if problem == "regression":
        assert tolerance is not None
        return (one - other).abs().amax(-1) < tolerance
    if problem == "multi_label_classification":
        return ((one > 0) == (other > 0)).all(-1)
    return one.argmax(-1) == other.argmax(-1)


def leave(
    logits: Tensor, before: Answers, *, rule: str, threshold: float, problem: str, tolerance: float | None = None
) -> tuple[Tensor, Answers]:
    """Which rows leave at an exit, (N,) bool, and what the next exit has to know.

    Args:
        logits: of the exit's head, (N, C).
        before: of the same rows.
        rule: one of :data:`RULES`.
        threshold: see above.
        problem: as transformers calls it.
        tolerance: of numbers.
    """
    streak = before.streak
    if before.last is not None and rule == "patience":
        streak = torch.where(agree(logits, before.last, problem, tolerance), streak + 1, 0)
    unsure = entropy(logits, problem) if rule == "entropy" else -streak.float()
    leaves = unsure < threshold if rule == "entropy" else streak >= threshold
    return leaves, Answers(logits, streak)


def find_exits(
    logits: Sequence[Tensor], *, rule: str, threshold: float, problem: str, tolerance: float | None = None
) -> Tensor:
    """At which exit each row leaves, counted from 0; `len(logits)` for rows that stay to the end, (N,).

    Args:
        logits: of each exit's head on all rows, (N, C).
        rule: as of :func:`leave`, like the other arguments.
        threshold: see there.
        problem: see there.
        tolerance: see there.
    """
    found = torch.full((len(logits[0]),), len(logits))
    answers = Answers.none(len(found))
    for number, given in enumerate(logits):
        leaves, answers = leave(given, answers, rule=rule, threshold=threshold, problem=problem, tolerance=tolerance)
        found[leaves & (found == len(logits))] = number
    return found
