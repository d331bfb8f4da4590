"""Statistics of moved inputs: what a site saw in the original model, and what it sees now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eckart.linalg import Metric, require_finite
from eckart.linalg.blocks import blocks
from eckart.moments.gram import Gram
from eckart.moments.mean import Mean
from eckart.moments.outer_products import add_gram, add_product, empty_gram
from eckart.moments.statistic import Statistic

# lambda, relative to the mean of the diagonal of E[x~ x~^T], for as many tokens as features. The regression of x on x~
# has n coefficients an output to learn from N tokens: its noise, and the ridge that it needs, go with n / N.
RIDGE = 3.0
LEAST_RIDGE = 1e-3

# Tokens of one product. Those of smaller batches wait for more: adding a product up costs as much as 75 tokens of it.
ENOUGH = 1024


@dataclass
class InputShift:
    """Statistics of pairs (x, x~) of a group: what it saw, and what it sees now.

    Attributes:
        count: tokens.
        gram: (n, n) sum of x~ x~^T; below its block diagonal it may lag behind, as in a `Gram`.
        cross: (n, n) sum of (x - x~) x~^T.
        total: (n,) sum of x.
        moved: (n,) sum of x~.
    """

    count: int
    gram: Tensor
    cross: Tensor
    total: Tensor
    moved: Tensor
    _waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def empty(cls, width: int, device: torch.device) -> InputShift:
        """Nothing seen yet."""
        vector = torch.zeros(width, device=device, dtype=torch.float64)
        square = empty_gram(width, vector)
        return cls(0, square, square.clone(), vector, vector.clone())

    def update(self, before: Tensor, now: Tensor) -> None:
        """Add tokens: x and x~, both (tokens, n). All or nothing, where memory runs out.

        Tokens of small batches are held on to, as they are, until there are enough of them.
        """
        waiting = [*self._waiting, (before, now)]
        if sum(len(rows) for _, rows in waiting) < ENOUGH:
            self._waiting = waiting
        else:
            self._add(waiting)
            self._waiting = []

    def flush(self) -> None:
        """Add the tokens that wait for more; the sums are complete then."""
        if self._waiting:
            self._add(self._waiting)
            self._waiting = []

    def _add(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        before, now = (_joined([rows.float() for rows in side]) for side in zip(*pairs, strict=True))
        difference = before - now
        total, moved = before.sum(0).double(), now.sum(0).double()  # all in float64 is slow
        buffer = None if self.cross.dtype == now.dtype else now.new_empty(self.cross.numel())
        add_gram(self.gram, now, buffer)
        add_product(self.cross, difference.mT, now, buffer)
        self.total += total
        self.moved += moved
        self.count += len(now)

    def require_finite(self, where: str) -> None:
        """Refuse inputs that were not finite: it shows in their sums, so that no token need be looked at by itself.

        Args:
            where: names the site in errors.

        Raises:
            NumericalError: if an x or an x~ was not finite.
        """
        self.flush()
        require_finite(self.moved, f"input of {where} in the compressed model")
        require_finite(self.total, f"input of {where} in the original model")

    def statistics(self) -> dict[str, Statistic]:
        """Those of x~ that metrics read, on the same sums."""
        self.flush()
        return {"gram": Gram(self.count, self.gram), "mean": Mean(self.count, self.moved)}

    def means(self) -> tuple[Tensor, Tensor]:
        """`mu = E[x]` and `mu~ = E[x~]`, (n,), float64."""
        self.flush()
        return self.total / self.count, self.moved / self.count

    def target(self, weight: Tensor, *, centered: bool) -> Tensor:
        """The same as :meth:`Regression.target`, for one weight."""
        return Regression(self).target(weight, centered=centered)

    def output_error(self, weight: Tensor, bias: Tensor | None, stored: Tensor, offset: Tensor | None) -> float:
        """`E || W x + b - W' x~ - b' ||^2 - E || W x + b ||^2`, summed over the outputs, float64.

        The second term, which needs x alone, is summed where x is seen. Without it `E[x x^T]` is not needed:

            tr(W' (E[x~ x~^T] W'^T - 2 E[x~ x^T] W^T)) + 2 (b' - b) . W' mu~ - 2 b' . (W mu + b) + b' . b'

        Args:
            weight: W, (m, n), which x is given to.
            bias: b, (m,), or None for zeros.
            stored: W', (m, n), which x~ is given to.
            offset: b', (m,), or None for zeros.
        """
        weight, stored = weight.double(), stored.double()
        nothing = weight.new_zeros(len(weight))
        b, b_now = (nothing if part is None else part.double() for part in (bias, offset))
        mean, moved = self.means()
        gram = Gram(self.count, self.gram).metric.dense(torch.float64)  # E[x~ x~^T]
        first = weight @ (self.cross.double() / self.count + gram)  # W E[x x~^T]
        error = (stored * (stored @ gram - 2 * first)).sum()
        error += 2 * (b_now - b) @ (stored @ moved) - 2 * b_now @ (weight @ mean + b) + b_now @ b_now
        return float(error)

    def metric(self, centered: bool) -> Metric:
        """`E[x~ x~^T]`, or the covariance of x~."""
        metric = Gram(self.count, self.gram).metric
        return Metric(full=metric.full, scale=metric.scale, mean=self.means()[1] if centered else None)

    def times_cross(self, weight: Tensor, centered: bool) -> Tensor:
        """`W E[(x - x~) x~^T]`, (m, n), float64; the covariance where centered."""
        weight = weight.double()
        product = weight.new_empty(weight.shape)
        for part in blocks(len(self.cross)):
            product[:, part] = weight @ self.cross[:, part].double()
        product /= self.count
        if centered:
            mean, moved = self.means()
            product.addr_(weight @ (mean - moved), moved, alpha=-1)
        return product

    def state(self) -> dict[str, Tensor]:
        """The sums themselves, not copies, and the count: what adds up over processes, and what is saved."""
        self.flush()
        sums = {"gram": self.gram, "cross": self.cross, "total": self.total, "moved": self.moved}
        return sums | {"count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> InputShift:
        """The shift that :meth:`state` serialized, on the same tensors."""
        return cls(int(state["count"]), state["gram"], state["cross"], state["total"], state["moved"])


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


class Regression:
    """The regression of x on x~, for all weights that read them: the matrix of x~ is factored once.

    Args:
        shift: of the group.
    """

    def __init__(self, shift: InputShift) -> None:
        shift.flush()
        self.shift = shift
        self._factors: dict[bool, Tensor | None] = {}

    def target(self, weight: Tensor, *, centered: bool) -> Tensor:
        """`T = W + W E[(x - x~) x~^T] (E[x~ x~^T] + lambda I)^-1`, (m, n); covariances where centered.

        The weight whose output on x~ is nearest to the original output on x; directions that the text never
        showed keep W.
        """
        if centered not in self._factors:
            self._factors[centered] = self._factor(centered)
        lower = self._factors[centered]
        if lower is None:
            return weight
        shift = self.shift.times_cross(weight, centered)  # (m, n); all solved in place: wide matrices in float64
        torch.linalg.solve_triangular(lower.mT, shift, upper=True, left=False, out=shift)
        torch.linalg.solve_triangular(lower, shift, upper=False, left=False, out=shift)
        return weight + shift.to(weight)

    def forget(self) -> None:
        """Drop the factored matrix: there are no more weights."""
        self._factors.clear()

    def _factor(self, centered: bool) -> Tensor | None:
        """The lower Cholesky factor of `E[x~ x~^T] + lambda I`, float64; None where nothing can be learned."""
        if self.shift.count == 0:
            return None
        gram = self.shift.metric(centered).dense(torch.float64)
        scale = gram.diagonal().mean()
        if not bool(scale > 0):  # dead inputs: nothing moved that could be seen
            return None
        ridge = max(LEAST_RIDGE, RIDGE * len(gram) / self.shift.count)
        gram.diagonal().add_(ridge * scale)
        lower = gram.mT  # symmetric, and column by column, as LAPACK writes the factor over it
        return torch.linalg.cholesky(lower, out=lower)  # positive definite by the ridge
