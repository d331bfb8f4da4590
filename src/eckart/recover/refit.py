"""Refit in closed form: every site is solved again on the inputs that the compressed model gives it.

After earlier sites are compressed a site sees x~ where it saw x. The target that makes its output on x~
match the original output on x is

    T = W + W E[(x - x~) x~^T] (E[x~ x~^T] + lambda I)^-1

and the metric of its inputs becomes E[x~ x~^T]. Directions that the text never showed keep W. With a bias
the statistics are centred and the means folded in: `b' = b + W mu - W' mu~`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.linalg import Metric

# lambda, relative to the mean of the diagonal of E[x~ x~^T].
RIDGE = 1e-3


@dataclass
class MovedInputs:
    """Statistics of pairs (x, x~) of a group: what it saw, and what it sees now.

    Attributes:
        count: tokens.
        gram: (n, n) sum of x~ x~^T.
        cross: (n, n) sum of (x - x~) x~^T.
        total: (n,) sum of x.
        moved: (n,) sum of x~.
    """

    count: int
    gram: Tensor
    cross: Tensor
    total: Tensor
    moved: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device) -> MovedInputs:
        """Nothing seen yet."""
        square = torch.zeros(width, width, device=device)
        vector = torch.zeros(width, device=device, dtype=torch.float64)
        return cls(0, square, square.clone(), vector, vector.clone())

    def update(self, before: Tensor, now: Tensor) -> None:
        """Add tokens: x and x~, both (tokens, n)."""
        before, now = before.float(), now.float()
        self.count += len(now)
        self.gram.addmm_(now.mT, now)
        self.cross.addmm_((before - now).mT, now)
        self.total += before.sum(0, dtype=torch.float64)
        self.moved += now.sum(0, dtype=torch.float64)

    def means(self) -> tuple[Tensor, Tensor]:
        """`mu = E[x]` and `mu~ = E[x~]`, (n,)."""
        return (self.total / self.count).to(self.gram), (self.moved / self.count).to(self.gram)

    def metric(self, centred: bool) -> Metric:
        """E[x~ x~^T], or the covariance of x~."""
        gram = self.gram / self.count
        if centred:
            _, moved = self.means()
            gram = gram - torch.outer(moved, moved)
        return Metric(full=(gram + gram.mT) / 2)

    def target(self, weight: Tensor, centred: bool) -> Tensor:
        """T, (m, n), for a weight (m, n)."""
        gram = self.metric(centred).full
        assert gram is not None
        cross = self.cross / self.count
        if centred:
            mean, moved = self.means()
            cross = cross - torch.outer(mean - moved, moved)
        ridge = gram.double()
        ridge.diagonal().add_(RIDGE * ridge.diagonal().mean())
        shift = torch.linalg.solve(ridge, cross.double(), left=False)
        return weight + (weight.double() @ shift).to(weight)


def refit(*args, **kwargs):  # placeholder until measured
    raise NotImplementedError
