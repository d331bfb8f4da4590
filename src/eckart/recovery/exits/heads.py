"""Heads trained on hidden states that are kept: the model itself stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from eckart.adaptive.early_exit import ExitHead

BATCH = 64
"""Rows of a step; states are small."""


def head_loss(
    logits: Tensor, taught: Tensor, labels: Tensor | None, problem: str, *, temperature: float, weight: float
) -> Tensor:
    """`T^2 KL(p_last || p_head) + weight CE(head, labels)`, a mean over rows; of numbers, squared differences.

    Args:
        logits: of the head, (N, C).
        taught: of the model's own head, (N, C).
        labels: (N,) or (N, C); None for none.
        problem: as transformers calls it.
        temperature: T, that both logits are divided by.
        weight: of the labels.
    """
    T = temperature
    if problem == "regression":
        loss = functional.mse_loss(logits, taught)
        return loss if labels is None else loss + weight * functional.mse_loss(logits, labels.view_as(logits).float())
    if problem == "multi_label_classification":
        goal = (taught / T).sigmoid()
        loss = T * T * functional.binary_cross_entropy_with_logits(logits / T, goal)
        more = None if labels is None else functional.binary_cross_entropy_with_logits(logits, labels.float())
    else:
        log_p, log_q = (taught / T).log_softmax(-1), (logits / T).log_softmax(-1)
        loss = T * T * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        more = None if labels is None else functional.cross_entropy(logits, labels.long())
    return loss if more is None else loss + weight * more


@torch.enable_grad()
def train_head(
    states: Tensor,
    taught: Tensor,
    labels: Tensor | None,
    *,
    problem: str,
    width: int,
    epochs: int,
    rate: float,
    temperature: float,
    weight: float,
    seed: int,
) -> ExitHead:
    """Train one head by AdamW, at a rate that falls to 0.

    States are standardized, feature by feature, and what that takes is folded into the head afterwards: rates and
    penalties mean the same whatever the size of a block's output.

    Args:
        states: what the head reads, (N, n).
        taught: of the model's own head, (N, C).
        labels: (N,) or (N, C); None for none.
        problem: as transformers calls it.
        width: of the layer inside the head; 0 for none.
        epochs: over the rows.
        rate: the highest learning rate.
        temperature: see :func:`head_loss`.
        weight: see :func:`head_loss`.
        seed: of the first weights and the order of the rows.
    """
    center, spread = states.mean(0), states.std(0, correction=0).clamp_min(1e-6)
    x = (states - center) / spread
    stream = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ExitHead(states.shape[1], width, taught.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate)
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=stream).split(BATCH):
            told = None if labels is None else labels[rows]
            loss = head_loss(head(x[rows]), taught[rows], told, problem, temperature=temperature, weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    first = head.dense if head.dense is not None else head.out
    with torch.no_grad():  # W ((x - c) / s) + b = (W / s) x + (b - (W / s) c)
        first.weight.div_(spread)
        first.bias.sub_(first.weight @ center)
    return head.requires_grad_(False)
