"""KL of rows of logits from an original's, with its gradient found on the way.

    KL_i = sum_j p_ij (log p_ij - log q_ij),    d KL_i / d z_ij = q_ij - p_ij

p and q are the softmax of the original's logits and of those of the smaller model, z.
Value and gradient are made of a few rows at a time, which stay in a processor's cache; of tables as large as the logits
only the gradient is kept. Built from torch's own operations the same takes eight such tables, which are slower to get
from the system than to compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PIECE, LARGE_PIECE = 1 << 19, 1 << 24
"""Numbers of a piece on a CPU, and on other devices, where a piece is a round of launches."""


class DivergenceLoss(torch.autograd.Function):
    """(N, V) logits of a smaller model and of its original -> (N,) KL in nats, float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, original: Tensor) -> Tensor:
        """Find the KL of each row, and the gradient where one is wanted, in the type of the logits."""
        piece = PIECE if logits.device.type == "cpu" else LARGE_PIECE
        rows = max(1, piece // max(1, logits.shape[-1]))
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        found = []
        for i in range(0, len(logits), rows):
            p, y, y_sum = _softmax(original[i : i + rows].float())
            q, z, z_sum = _softmax(logits[i : i + rows].float())
            difference = y.sub_(z).sub_(y_sum - z_sum)  # of log p and log q
            difference.masked_fill_(p == 0, 0.0)  # a class that the original rules out costs nothing
            found.append(torch.linalg.vecdot(p, difference).clamp(min=0.0))
            if gradient is not None:
                torch.sub(q, p, out=q)
                gradient[i : i + rows] = q
        ctx.save_for_backward(gradient)
        return torch.cat(found) if found else logits.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None]:
        """The gradient of each row, times what comes from outside."""
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else gradient * outer[0].to(gradient.dtype)[:, None]), None


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of rows; logits less the largest of their row; logarithm of the sum of the exponentials of these."""
    less = logits - logits.amax(-1, keepdim=True)
    powers = less.exp()
    total = powers.sum(-1, keepdim=True)
    return powers.div_(total), less, total.log()
