"""Running statistics of a site's inputs and output gradients.

Sums and token counts, never means, so that two accumulators over different text add up to the one over both.
Everything is summed in float64, but for Grams too wide for that (:data:`eckart.linalg.WIDE`): products of one batch are
those of float32, and their sum is the same in whatever order batches come and processes share them. An update that
runs out of memory has added nothing: what it needs is allocated before anything is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from eckart.errors import NumericalError
from eckart.linalg import WIDE, Metric
from eckart.linalg.blocks import blocks

# A Gram is symmetric: from this width on only blocks on and above the diagonal are computed.
BLOCK = 384
# Squared gradients that are held at once, in float64: 128 MB.
FISHER_ENTRIES = 2**24


def add_gram(total: Tensor, rows: Tensor, room: Tensor | None = None) -> None:
    """Add `rows^T rows` to the upper block triangle of `total`, in place.

    Args:
        total: (n, n) running sum, float32 or float64; below the block diagonal it is not touched.
        rows: (tokens, n), float32.
        room: see :func:`add_product`; found here where it is not given.
    """
    width = rows.shape[1]
    parts = list(blocks(width, BLOCK)) if width >= 2 * BLOCK else [slice(0, width)]
    if room is None and total.dtype != rows.dtype:  # before anything is added
        room = rows.new_empty(parts[0].stop * width)
    for part in parts:
        add_product(total[part, part.start :], rows[:, part].mT, rows[:, part.start :], room)


def add_product(total: Tensor, left: Tensor, right: Tensor, room: Tensor | None = None) -> None:
    """`total += left @ right` in place; a float64 total gets the float32 product, made in `room` (float32, flat)."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        room = left.new_empty(total.numel()) if room is None else room
        total += torch.mm(left, right, out=room[: total.numel()].view(total.shape))


def empty_gram(width: int, like: Tensor) -> Tensor:
    """(width, width) zeros on the device of `like`, in the type that a Gram of this width is summed in."""
    return like.new_zeros(width, width, dtype=torch.float32 if width > WIDE else torch.float64)


def complete(total: Tensor) -> None:
    """Fill in, in place, what :func:`add_gram` leaves out: symmetric then, up to rounding."""
    if len(total) < 2 * BLOCK:
        return
    for part in blocks(len(total), BLOCK):
        total[part.stop :, part] = total[part, part.stop :].mT


@dataclass
class SecondMoment:
    """Sum of `x x^T` over tokens, with sums of `x` and `|x|` beside it where they are asked for.

    Attributes:
        width: n; 0 if that is not known before the first token.
        count: tokens seen.
        gram: (n, n), the sum, float64 up to a width of `WIDE`, else float32; below its block diagonal it may lag
            behind, until a mean is asked for. None when not gathered.
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
    # Whether nothing of `gram` lags behind: every site of a group asks for its mean.
    _complete: bool = field(default=False, repr=False, compare=False)

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
        magnitudes = rows.abs().sum(0).double() if self.with_absolute else None
        if self.with_gram and self.gram is None:
            self.gram = empty_gram(rows.shape[1], rows)
        if self.total is None:
            self.total = torch.zeros_like(sums)
        if magnitudes is not None and self.absolute is None:
            self.absolute = torch.zeros_like(magnitudes)
        if self.with_gram and self.gram is not None:
            add_gram(self.gram, rows)
            self._complete = False
        self.total += sums
        if magnitudes is not None and self.absolute is not None:
            self.absolute += magnitudes
        self.count += len(rows)
        self.width = rows.shape[1]

    def merge(self, other: SecondMoment) -> None:
        """Add what another accumulator saw."""
        self.count += other.count
        self.gram = _merged(self.gram, other.gram)
        self.total = _merged(self.total, other.total)
        self.absolute = _merged(self.absolute, other.absolute)
        self._complete = False

    @property
    def metric(self) -> Metric:
        """`E[x x^T]`, which reads the sum where it lies: nothing of its size is made."""
        self._fill_in()
        assert self.gram is not None, "this run did not gather Grams"
        return Metric(full=self.gram, scale=1 / max(self.count, 1))

    @property
    def mean_gram(self) -> Tensor:
        """`E[x x^T]`, (n, n), a new tensor; :attr:`metric` does without."""
        return self.metric.matrix

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

    def without_gram(self) -> SecondMoment:
        """The counts and means alone; the Gram is not kept alive."""
        return replace(self, with_gram=False, gram=None)

    def state(self) -> dict[str, Tensor]:
        """The sums themselves, not copies, and the count: what adds up over processes, and what is saved."""
        self._fill_in()  # so that nobody has to write to what was saved
        parts = {"gram": self.gram, "total": self.total, "absolute": self.absolute}
        return _present(parts) | {"count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> SecondMoment:
        """What :meth:`state` took apart, on the same tensors.

        An accumulator that had seen nothing comes back without its width, to gather Grams.
        """
        gram, total, absolute = (state.get(name) for name in ("gram", "total", "absolute"))
        count, width = int(state["count"]), 0 if total is None else len(total)
        return cls(width, gram is not None or count == 0, absolute is not None, count, gram, total, absolute, True)

    def _fill_in(self) -> None:
        if self.gram is not None and not self._complete:
            complete(self.gram)
            self._complete = True


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
        m, n = gradients.shape[-1], inputs.shape[-1]
        rows = gradients.new_zeros(m, dtype=torch.float64)
        columns = inputs.new_zeros(n, dtype=torch.float64)
        for some in blocks(len(inputs), max(1, FISHER_ENTRIES // (m * n))):
            x = inputs[some].float()
            for part in blocks(m, max(1, FISHER_ENTRIES // n)):
                squared = torch.bmm(gradients[some, :, part].float().mT, x).square_().double()  # (some, part, n)
                rows[part] += squared.sum(dim=(0, 2))
                columns += squared.sum(dim=(0, 1))
        if self.rows is None or self.columns is None:
            self.rows, self.columns = rows, columns
        else:
            self.rows += rows
            self.columns += columns
        self.sequences += len(inputs)

    def merge(self, other: Fisher) -> None:
        """Add what another accumulator saw."""
        self.rows = _merged(self.rows, other.rows)
        self.columns = _merged(self.columns, other.columns)
        self.sequences += other.sequences

    def state(self) -> dict[str, Tensor]:
        """The sums themselves, not copies, and the count: what adds up over processes, and what is saved."""
        return _present({"rows": self.rows, "columns": self.columns}) | {"sequences": torch.tensor(self.sequences)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Fisher:
        """What :meth:`state` took apart, on the same tensors."""
        return cls(state.get("rows"), state.get("columns"), int(state["sequences"]))


@dataclass
class Moments:
    """All that a metric may ask of a site.

    Attributes:
        inputs: of the site's input; shared by every site of its group.
        gradients: of the loss's gradient at the site's output, one row a token; None when not gathered.
        fisher: row and column sums of the squared weight gradients; None when not gathered.
        sequences: how many sequences the run saw; with `inputs.count`, tokens per sequence.
        centered: whether the bias absorbs the means, so that the error is measured by the covariance.
    """

    inputs: SecondMoment
    gradients: SecondMoment | None = None
    fisher: Fisher | None = None
    sequences: int = 0
    centered: bool = False

    @property
    def input_metric(self) -> Metric:
        """`E[x x^T]`, or the covariance of x where the bias absorbs the means; nothing of its size is made."""
        metric = self.inputs.metric
        if not self.centered:
            return metric
        centered = replace(metric, mean=self.inputs.mean)
        rounding = 4 * torch.finfo(torch.float32).eps  # of a batch's products, whatever they are summed in
        # Of inputs that never varied nothing but rounding is left, which must not look like a direction.
        return replace(metric, scale=0.0) if centered.mean_diagonal <= rounding * metric.mean_diagonal else centered

    @property
    def input_gram(self) -> Tensor:
        """The matrix of :attr:`input_metric`, (n, n), a new tensor."""
        return self.input_metric.matrix

    def merge(self, other: Moments) -> None:
        """Add what another run saw of the same site, but for the inputs, which belong to the whole group.

        :func:`eckart.moments.merge` adds up all of a model's sites, and the inputs of each group once.
        """
        if self.gradients is not None and other.gradients is not None:
            self.gradients.merge(other.gradients)
        if self.fisher is not None and other.fisher is not None:
            self.fisher.merge(other.fisher)
        self.sequences += other.sequences

    def state(self) -> dict[str, Tensor]:
        """The parts' states as `inputs.gram` and so on, `sequences`, and `centered` where it is set.

        Sites of a group would each name the same inputs: :func:`eckart.moments.pack` names them once.
        """
        state = {"sequences": torch.tensor(self.sequences)}
        for name, part in (("inputs", self.inputs), ("gradients", self.gradients), ("fisher", self.fisher)):
            if part is not None:
                state |= {f"{name}.{key}": tensor for key, tensor in part.state().items()}
        return state | ({"centered": torch.tensor(1)} if self.centered else {})

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], inputs: SecondMoment | None = None) -> Moments:
        """What :meth:`state` took apart, on the same tensors.

        Args:
            state: of the site.
            inputs: of its group, where they are there already.
        """
        gradients, fisher = _part(state, "gradients"), _part(state, "fisher")
        return cls(
            inputs if inputs is not None else SecondMoment.from_state(_part(state, "inputs")),
            SecondMoment.from_state(gradients) if gradients else None,
            Fisher.from_state(fisher) if fisher else None,
            int(state["sequences"]),
            "centered" in state,
        )


def _merged(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum, in place in `first` where its dtype allows: a wide one is not held twice."""
    if second is None:
        return first
    if first is None:
        return second.clone()  # sums are added to in place, and the other accumulator keeps its own
    return first.to(torch.promote_types(first.dtype, second.dtype)).add_(second)


def _present(parts: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


def _part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
