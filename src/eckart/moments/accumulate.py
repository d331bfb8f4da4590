"""Running statistics of a site's inputs and output gradients.

Sums and token counts, never means, so that two accumulators over different text merge into the one over
both. Sums are kept in float32 and merged in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from eckart.errors import NumericalError

# A Gram is symmetric: from this width on only blocks on and above the diagonal are computed.
BLOCK = 384


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add `rows^T rows` to the upper block triangle of `total`, in place.

    Args:
        total: (n, n) running sum; below the block diagonal it is not touched.
        rows: (tokens, n), in the dtype of `total`.
    """
    width = rows.shape[1]
    if width < 2 * BLOCK:
        total.addmm_(rows.mT, rows)
        return
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        total[start:stop, start:].addmm_(rows[:, start:stop].mT, rows[:, start:])


def symmetric(total: Tensor) -> Tensor:
    """The full matrix of a sum made by :func:`add_gram`."""
    return torch.triu(total) + torch.triu(total, 1).mT


@dataclass
class SecondMoment:
    """Sum of `x x^T` over tokens, with sums of `x` and `|x|` beside it where they are asked for.

    Attributes:
        width: n.
        count: tokens seen.
        gram: (n, n), the sum; below its block diagonal it may lag behind. None when not gathered.
        total: (n,) sum of x, float64.
        absolute: (n,) sum of |x|, float64, or None when not gathered.
    """

    width: int
    with_gram: bool = True
    with_absolute: bool = False
    count: int = 0
    gram: Tensor | None = None
    total: Tensor | None = None
    absolute: Tensor | None = None
    # The count at which `gram` was last made symmetric: every site of a group asks for its mean.
    _symmetric_at: int = field(default=-1, repr=False, compare=False)

    def update(self, rows: Tensor, where: str) -> None:
        """Add tokens.

        Args:
            rows: (tokens, n), padding already removed.
            where: the site and batch, named when the numbers are not finite.

        Raises:
            NumericalError: on NaN or infinity; nothing is added then.
        """
        rows = rows.detach().float()
        sums = rows.sum(0).double()  # float32 within a batch, float64 over batches: a second pass in float64 is slow
        if not bool(torch.isfinite(sums).all()):
            bad = int((~torch.isfinite(rows)).sum())
            raise NumericalError(
                f"{where}: {bad} of {rows.numel()} values are NaN or infinite. "
                "Load the model in float32 or bfloat16 (float16 overflows), or look at this batch's text."
            )
        self.count += len(rows)
        self.total = sums if self.total is None else self.total + sums
        if self.with_gram:
            if self.gram is None:
                self.gram = rows.new_zeros(self.width, self.width)
            add_gram(self.gram, rows)
        if self.with_absolute:
            absolute = rows.abs().sum(0).double()
            self.absolute = absolute if self.absolute is None else self.absolute + absolute

    def merge(self, other: SecondMoment) -> None:
        """Add what another accumulator saw, in float64."""
        self.count += other.count
        self.gram = _merged(self.gram, other.gram)
        self.total = _merged(self.total, other.total)
        self.absolute = _merged(self.absolute, other.absolute)

    @property
    def mean_gram(self) -> Tensor:
        """`E[x x^T]`, (n, n)."""
        assert self.gram is not None, "this run did not gather Grams"
        if self._symmetric_at != self.count:
            self.gram, self._symmetric_at = symmetric(self.gram), self.count
        return self.gram / max(self.count, 1)

    @property
    def mean(self) -> Tensor:
        """`E[x]`, (n,), float64."""
        assert self.total is not None
        return self.total / max(self.count, 1)

    @property
    def mean_absolute(self) -> Tensor:
        """`E|x|`, (n,), float64."""
        assert self.absolute is not None, "this run did not gather absolute means"
        return self.absolute / max(self.count, 1)


@dataclass
class Fisher:
    """Sums over sequences of the squared gradient of the weight, reduced to its rows and its columns.

    Attributes:
        rows: (m,) float64, summed over each output row.
        columns: (n,) float64, summed over each input column.
        sequences: how many were seen.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    sequences: int = 0

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add sequences: inputs (B, T, n) and output gradients (B, T, m), zero where padded.

        The gradient of W for one sequence is `g^T x`, (m, n): formed per sequence, then squared.
        """
        squared = torch.bmm(gradients.float().mT, inputs.float()).square_()  # (B, m, n)
        self.rows = _merged(self.rows, squared.sum(dim=(0, 2), dtype=torch.float64))
        self.columns = _merged(self.columns, squared.sum(dim=(0, 1), dtype=torch.float64))
        self.sequences += len(inputs)

    def merge(self, other: Fisher) -> None:
        """Add what another accumulator saw."""
        self.rows = _merged(self.rows, other.rows)
        self.columns = _merged(self.columns, other.columns)
        self.sequences += other.sequences


@dataclass
class Moments:
    """All that a metric may ask of a site.

    Attributes:
        inputs: of the site's input; shared by every site of its group.
        gradients: of the loss's gradient at the site's output, one row a token; None when not gathered.
        fisher: row and column sums of the squared weight gradients; None when not gathered.
        sequences: how many sequences the run saw; with `inputs.count`, tokens per sequence.
        centred: whether the bias absorbs the means, so that the error is measured by the covariance.
    """

    inputs: SecondMoment
    gradients: SecondMoment | None = None
    fisher: Fisher | None = None
    sequences: int = 0
    centred: bool = False

    @property
    def input_gram(self) -> Tensor:
        """`E[x x^T]`, or the covariance of x where the bias absorbs the means; (n, n)."""
        gram = self.inputs.mean_gram
        if not self.centred:
            return gram
        mean = self.inputs.mean.to(gram)
        return gram - torch.outer(mean, mean)

    def merge(self, other: Moments) -> None:
        """Add what another run saw of the same site; groups share inputs, so merge those once."""
        if self.gradients is not None and other.gradients is not None:
            self.gradients.merge(other.gradients)
        if self.fisher is not None and other.fisher is not None:
            self.fisher.merge(other.fisher)
        self.sequences += other.sequences


def _merged(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if second is None:
        return first
    if first is None:
        return second.clone()  # sums are added to in place, and the other accumulator keeps its own
    return (first.double() + second.double()).to(torch.promote_types(first.dtype, second.dtype))
