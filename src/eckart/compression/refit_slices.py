"""Solve the weights of a layer with fewer neurons again, on the inputs that the compressed model gives them."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.moments.input_shift import LEAST_RIDGE, RIDGE, InputShift


def refit_reader(shift: InputShift, weight: Tensor, now: Tensor, *, centered: bool) -> Tensor:
    """`W' + E[(W h - W' h~) h~^T] (E[h~ h~^T] + lambda I)^-1`, (m, k), float64; covariances where centered.

    The weight whose output on the neurons that are left, as they fire now, is nearest to the original output on all of
    them. The corrected weight W' is what it is drawn to: directions that the text never showed keep it.

    Args:
        shift: of pairs (h, h~), h (w) the neurons of the original and h~ those that are left in the compressed model,
            (k) numbers and w - k zeros after them.
        weight: W, (m, w), of the original.
        now: W', (m, k), which reads the neurons that are left.
        centered: whether a bias takes up the means.
    """
    count = now.shape[1]
    now = now.to(weight.device).double()
    gram = shift.metric(centered).dense(torch.float64)[:count, :count]
    scale = gram.diagonal().mean()
    if shift.count == 0 or not bool(scale > 0):  # nothing was seen
        return now
    # times_cross is of h - h~; what h~ stands for beyond its own neurons is zero.
    cross = shift.times_cross(weight, centered)[:, :count] + weight.double()[:, :count] @ gram
    rest = cross - now @ gram
    ridge = max(LEAST_RIDGE, RIDGE * count / shift.count)
    gram.diagonal().add_(ridge * scale)
    lower = torch.linalg.cholesky(gram)  # positive definite by the ridge
    return now + torch.cholesky_solve(rest.mT, lower).mT
