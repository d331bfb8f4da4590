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

PIECE = 1 << 19
"""Numbers of a piece."""


class DivergenceLoss(torch.autograd.Function):
    """(N, V) logits of a smaller model and of its original -> (N,) KL in nats, float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, original: Tensor) -> Tensor:
        """Find the KL of each row, and the gradient where one is wanted, in the type of the logits."""
        rows = max(1, PIECE // max(1, logits.shape[-1]))
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        found = []
        for i in range(0, len(logits), rows):
            y, z = original[i : i + rows].float(), logits[i : i + rows].float()
            (p, y_sum), (q, z_sum) = _softmax(y), _softmax(z)
            difference = (y - z).sub_((y_sum - z_sum)[:, None])  # of log p and log q
            value = torch.linalg.vecdot(p, difference)
            if not bool(value.isfinite().all()):  # a class that is ruled out by the original costs nothing
                value = torch.where(p > 0, p * difference, 0.0).sum(-1)
            found.append(value.clamp(min=0.0))
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


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of rows, and the logarithm of the sum of their exponentials; each exponential is computed once."""
    most = logits.amax(-1, keepdim=True)
    powers = (logits - most).exp_()
    total = powers.sum(-1, keepdim=True)
    return powers.div_(total), (most + total.log()).squeeze(-1)
