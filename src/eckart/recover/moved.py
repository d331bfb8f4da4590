"""Statistics of moved inputs: what a site saw in the original model, and what it sees now."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.linalg import require_finite
from eckart.moments import SecondMoment

# lambda, relative to the mean of the diagonal of E[x~ x~^T], for as many tokens as features. The regression of x on x~
# has n coefficients an output to learn from N tokens: its noise, and the ridge that it needs, go with n / N.
RIDGE = 3.0
LEAST_RIDGE = 1e-3


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

    def update(self, before: Tensor, now: Tensor, where: str) -> None:
        """Add tokens: x and x~, both (tokens, n); `where` names them in errors.

        Raises:
            NumericalError: if the compressed model's x~ is not finite.
        """
        before, now = before.float(), now.float()
        require_finite(now, where)
        self.count += len(now)
        self.gram.addmm_(now.mT, now)
        self.cross.addmm_((before - now).mT, now)
        self.total += before.sum(0, dtype=torch.float64)
        self.moved += now.sum(0, dtype=torch.float64)

    def second_moment(self) -> SecondMoment:
        """Of x~, in the shape that metrics read."""
        return SecondMoment(self.gram.shape[0], count=self.count, gram=self.gram, total=self.moved)

    def means(self) -> tuple[Tensor, Tensor]:
        """`mu = E[x]` and `mu~ = E[x~]`, (n,), float64."""
        return self.total / self.count, self.moved / self.count

    def target(self, weight: Tensor, *, centred: bool) -> Tensor:
        """`T = W + W E[(x - x~) x~^T] (E[x~ x~^T] + lambda I)^-1`, (m, n); covariances where centred.

        The weight whose output on x~ is nearest to the original output on x; directions that the text never
        showed keep W.
        """
        if self.count == 0:
            return weight
        gram = self.gram.double() / self.count
        cross = self.cross.double() / self.count
        if centred:
            mean, moved = self.means()
            gram = gram - torch.outer(moved, moved)
            cross = cross - torch.outer(mean - moved, moved)
        scale = gram.diagonal().mean()
        if not bool(scale > 0):  # dead inputs: nothing moved that could be seen
            return weight
        ridge = max(LEAST_RIDGE, RIDGE * len(gram) / self.count)
        gram.diagonal().add_(ridge * scale)
        lower = torch.linalg.cholesky(gram)  # positive definite by the ridge
        shift = torch.cholesky_solve(cross.mT, lower).mT  # (n, n), cross gram^-1
        return weight + (weight.double() @ shift).to(weight)
