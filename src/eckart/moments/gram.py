"""The Gram matrix of the inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

from torch import Tensor

from eckart.linalg import Metric
from eckart.moments.outer_products import add_gram, empty_gram, fill_lower, gram_nbytes
from eckart.moments.statistic import InputStatistic, Statistic


@dataclass
class OuterProducts(Statistic):
    """`sum r r^T` over rows r.

    Attributes:
        count: rows.
        gram: (n, n) the sum; below its block diagonal it may lag behind, until it is read as :attr:`metric`.
    """

    count: int = 0
    gram: Tensor | None = None
    # Whether nothing of `gram` lags behind: every site of a group asks for its metric.
    _complete: bool = field(default=False, repr=False, compare=False)

    def update(self, rows: Tensor) -> None:
        rows = rows.float()
        gram = empty_gram(rows.shape[1], rows) if self.gram is None else self.gram
        add_gram(gram, rows)
        self.gram = gram
        self.count += len(rows)
        self._complete = False

    def merge(self, other: Self) -> None:
        super().merge(other)
        self._complete = False

    def state(self) -> dict[str, Tensor]:
        self._fill_in()  # so that nobody has to write to what was saved
        return super().state()

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:  # type: ignore[override]
        found = super().from_state(state)
        found._complete = True
        return found

    @property
    def metric(self) -> Metric:
        """`E[r r^T]`, which reads the sum in place: nothing of its size is made."""
        self._fill_in()
        assert self.gram is not None, "no row was seen"
        return Metric(full=self.gram, scale=1 / max(self.count, 1))

    @property
    def mean(self) -> Tensor:
        """`E[r r^T]`, (n, n), a new tensor; :attr:`metric` does without."""
        return self.metric.matrix

    def _fill_in(self) -> None:
        if self.gram is not None and not self._complete:
            fill_lower(self.gram)
            self._complete = True


class Gram(OuterProducts, InputStatistic):
    """`sum x x^T` over the tokens that a site reads."""

    needs_backward: ClassVar[bool] = False  # of two bases; tables of methods read it from the source

    @classmethod
    def nbytes(cls, out_features: int, in_features: int) -> int:
        return gram_nbytes(in_features)
