"""Log-probabilities out of logits in float32, a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 24
"""Numbers that are widened to float32 at once: 64 MB."""


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return what each target costs.

    Args:
        logits: (N, V), any floating dtype.
        targets: Class numbers (N,).

    Returns:
        -log softmax(logits)[target] in nats (N,), float64; not finite where the logits are not.
    """
    pieces = [
        torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none").double()
        for part, wanted in _pieces(logits, targets)
    ]
    return torch.cat(pieces) if pieces else logits.new_zeros(0, dtype=torch.float64)


def compare_distributions(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Compare two distributions row by row.

    Args:
        logits: The model's (N, V).
        reference: What it is held against (N, V).

    Returns:
        KL(reference || model) in nats (N,), float64, and whether the most likely class is the same (N,), bool.
    """
    divergences, same = [], []
    for part, truth in _pieces(logits, reference):
        model, true = part.float().log_softmax(-1), truth.float().log_softmax(-1)
        # 0 log 0 is 0: a class ruled out by the reference costs nothing, however unlikely the model has it.
        terms = torch.where(true == -torch.inf, 0.0, true.exp() * (true - model))
        divergences.append(terms.double().sum(-1))
        same.append(part.argmax(-1) == truth.argmax(-1))
    if not divergences:
        return logits.new_zeros(0, dtype=torch.float64), logits.new_zeros(0, dtype=torch.bool)
    return torch.cat(divergences), torch.cat(same)


def compare_labels(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Compare two models of several labels at once, each of which holds or does not by the sigmoid of its logit.

    Args:
        logits: The model's (N, C).
        reference: What it is held against (N, C).

    Returns:
        KL(reference || model) in nats, summed over the labels of a row and shared out among them (N, C), float64, and
        whether a label is more likely than not in both or neither (N, C), bool.
    """
    model, truth = logits.double(), reference.double()
    log_sigmoid = torch.nn.functional.logsigmoid
    held = truth.sigmoid() * (log_sigmoid(truth) - log_sigmoid(model))
    not_held = (-truth).sigmoid() * (log_sigmoid(-truth) - log_sigmoid(-model))
    return held + not_held, (logits > 0) == (reference > 0)


def _pieces(logits: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, PIECE // max(1, logits.shape[-1]))
    for start in range(0, len(logits), rows):
        yield logits[start : start + rows], other[start : start + rows]
