"""The base of the stored forms of a Linear's weight.

A new form is a subclass of :class:`FactoredLinear` in a file of its own, and one line in :data:`eckart.registry.FORMS`.
All other code asks the class: what a rank stores, how its factors are found, what can be done with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.forms.base import Factored, StoredSize, number_type, numbers_of
from eckart.forms.lazy import LazyWeight
from eckart.forms.quantized import QuantizedLinear
from eckart.linalg import Factorization, Problem, curve_under, factorize

Block = tuple[int, int]
"""(rows, columns) of the blocks that a form cuts a weight into."""


class FactoredLinear(Factored):
    """`y = x W'^T + b` with W' (out, in) in a stored form.

    A subclass sets `form`, builds its leaves in `__init__` (plain `nn.Linear`, so that adapters and quantizers find
    them), and defines `size`, `store`, `to_dense`, `dense_bias` and `forward`. One that cuts weights into blocks also
    defines `blocks` and what takes a block; one that several modules share a part of, what stands under "sharing".

    Attributes:
        in_features: n.
        out_features: m.
        rank: k.
        source: the kind of module it replaced, "linear" or "conv1d": what `densify` gives back.
        block: shape of the blocks that it cuts the weight into; None for a form without blocks.
        refits: whether it can be solved again on the inputs that the compressed model gives it.
        weighted_exactly: whether :meth:`solve` is optimal under every metric, not under the identity alone.
        paper: where the form was published, for the table of `eckart methods`.
        shared_parameter: the parameter that may be another module's too, which a plan then names as its `basis`; None
            for a form that shares nothing.
        unshared_form: of a form that shares, the form of weights that have none to share with.
        shared_by: of a form that shares, which weights do: "layers", of one role in adjacent layers; "input", those
            that read one and the same tensor, and so share their product with it; "neurons" where weights make and read
            the same ones.
        rounded_as: of a form whose numbers lose too much when they are rounded to integers, the form of two factors
            that holds the same matrix and does not; None where the form's own numbers can be rounded.
        own_module: whether its modules have this class; else they are ordinary ones of another size.
        sharers: how many modules hold the shared parameter, this one included.
    """

    sizes: ClassVar[tuple[str, ...]] = ("in_features", "out_features", "rank")
    refits: ClassVar[bool] = True
    weighted_exactly: ClassVar[bool] = True
    paper: ClassVar[str] = ""
    shared_parameter: ClassVar[str | None] = None
    unshared_form: ClassVar[str] = "lowrank"
    shared_by: ClassVar[str] = "layers"
    rounded_as: ClassVar[str | None] = None
    own_module: ClassVar[bool] = True
    sharers: int = 1

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool, source: str, block: Block | None = None
    ) -> None:
        super().__init__()
        full = self.full_rank(out_features, in_features, block)
        if not 1 <= rank <= full:
            raise UsageError(
                f"form {self.form}: rank {rank} is outside 1..{full} "
                f"for a weight of {out_features} x {in_features}; choose a rank inside."
            )
        if source not in ("linear", "conv1d"):
            raise UsageError(f"form {self.form}: source {source!r} is unknown; use 'linear' or 'conv1d'.")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.has_bias = bias
        self.source = source

    # -- what a form defines -------------------------------------------------------------------------

    @classmethod
    def size(cls, out_features: int, in_features: int, rank: int, block: Block | None = None) -> StoredSize:
        """What the form stores and computes at a rank, the bias left out."""
        raise NotImplementedError

    @classmethod
    def blocks(cls, out_features: int, in_features: int) -> tuple[Block | None, ...]:
        """The shapes of blocks to choose from; None alone for a form without blocks."""
        return (None,)

    @classmethod
    def full_rank(cls, out_features: int, in_features: int, block: Block | None = None) -> int:
        """The rank at which any weight of this shape can be held."""
        return min(out_features, in_features)

    @classmethod
    def max_rank(cls, out_features: int, in_features: int, block: Block | None = None) -> int:
        """The largest rank that still stores fewer numbers than the dense weight; 0 if none does."""
        dense = out_features * in_features
        low, high = 0, cls.full_rank(out_features, in_features, block)
        while low < high:  # size grows with the rank
            middle = (low + high + 1) // 2
            if cls.size(out_features, in_features, middle, block).parameters < dense:
                low = middle
            else:
                high = middle - 1
        return low

    @classmethod
    def rank_multiple(cls, out_features: int, in_features: int, wanted: int) -> int:
        """What ranks are multiples of where a target likes sizes that are multiples of `wanted`."""
        return wanted

    @classmethod
    def factor_elements(cls, out_features: int, in_features: int, rank: int, block: Block | None = None) -> int:
        """Numbers of the two factors that :meth:`solve` returns at a rank."""
        return rank * (out_features + in_features)

    @classmethod
    def solve(cls, problem: Problem, block: Block | None, limit: int, what: str) -> Factorization:
        """The factors that :meth:`store` takes, for every rank up to `limit` at least."""
        return factorize(problem, what)

    @classmethod
    def errors_under(cls, solved: Factorization, problem: Problem, block: Block | None, limit: int) -> Tensor:
        """Squared error of ranks 0, 1, ..., `limit` at least, measured in another problem's metric."""
        return curve_under(solved, problem)

    @classmethod
    def times(cls, left: Tensor, right: Tensor, vector: Tensor, block: Block | None) -> Tensor:
        """`W' v` of the factors that :meth:`store` takes."""
        return left @ (right @ vector)

    def store(self, left: Tensor, right: Tensor, bias: Tensor | None) -> str | None:
        """Fill the module with `W' = left @ right` and the bias.

        Args:
            left: B, (out, rank).
            right: A, (rank, in).
            bias: (out,) or None.

        Returns:
            None, or why the form cannot hold this matrix within its numerical bound; then nothing
            has been written and the caller falls back to another form and records the reason.
        """
        raise NotImplementedError

    def dense_bias(self) -> Tensor | None:
        """b, (out,), as the dense layer had it."""
        raise NotImplementedError

    def two_factors(self) -> tuple[Tensor, Tensor] | None:
        """B (out, k) and A (k, in) of the `B A` in W', in float64; None for a form that is no such product.

        A form that has them, and no `rounded_as`, stores A as the weight of `first` and B as that of `second`, and any
        other B and A of the same product can stand there.
        """
        return None

    # -- sharing: a part that is stored once for several modules -----------------------------------------

    @classmethod
    def shared_elements(cls, in_features: int, rank: int) -> int:
        """Numbers of the shared parameter, which count once for a group."""
        return 0

    @classmethod
    def solve_group(cls, problem: Problem, heights: Sequence[int], limit: int, what: str) -> list[Factorization]:
        """The factors of several weights that share a part.

        Args:
            problem: its target, (sum of heights, in), holds the weights stacked, as
                :func:`eckart.linalg.stack_problems` does.
            heights: outputs of each weight.
            limit: the largest rank that will be asked for.
            what: the group's name in errors and notes.
        """
        raise NotImplementedError

    def held_parameter(self) -> Tensor | None:
        """The parameter that may be another module's too; None for a form without, or where an adapter stands for it.

        Modules share it if this is one object.
        """
        part: Any = self if self.shared_parameter is not None else None
        *path, key = (self.shared_parameter or "").split(".")
        for name in path:
            part = getattr(part, "_modules", {}).get(name)
        if isinstance(part, QuantizedLinear) and key == "weight":
            return numbers_of(part)
        return None if part is None else part._parameters.get(key)

    # -- the same for all forms ----------------------------------------------------------------------

    @classmethod
    def block_arguments(cls, block: Block | None) -> dict[str, Any]:
        """The arguments of `__init__` that say which block; none for a form without blocks."""
        return {}

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        rank: int,
        *,
        bias: bool,
        source: str = "linear",
        block: Block | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """A module to be filled: no number is drawn, so that the global random state stays as it is.

        Raises:
            UsageError: for a rank, a source or a block that is not possible.
        """
        with torch.device("meta"):
            module = cls(in_features, out_features, rank, bias=bias, source=source, **cls.block_arguments(block))
        return module.to(dtype=dtype).to_empty(device=device)

    @property
    def block(self) -> Block | None:
        """Shape of its blocks, if it has any."""
        return None

    @classmethod
    def options(cls, spec: dict[str, Any]) -> dict[str, Any]:
        """Bias and kind of module replaced."""
        return {"bias": bool(spec.get("bias", True)), "source": spec.get("source", "linear")}

    def spec(self) -> dict[str, Any]:
        """All that :func:`eckart.forms.build` needs to rebuild the module, as JSON values."""
        return super().spec() | {"bias": self.has_bias, "source": self.source}

    def multiply_adds(self) -> int:
        """Multiply-adds per token."""
        return self.size(self.out_features, self.in_features, self.rank, self.block).multiply_adds

    @property
    def weight(self) -> Tensor:
        """The dense weight, computed when something reads its values; dtype and shape are free.

        Models that bypass `forward`, or ask for `layer.weight.dtype` at every step, keep working.
        It is in the orientation of the module that was replaced: (in, out) for a Conv1D.
        """
        leaf = number_type(self)
        shape = (self.out_features, self.in_features)
        flip = self.source == "conv1d"

        def dense() -> Tensor:
            return self.to_dense().mT if flip else self.to_dense()

        return LazyWeight.of(dense, shape[::-1] if flip else shape, leaf)

    @property
    def bias(self) -> Tensor | None:
        """The dense bias, for models that read it."""
        return self.dense_bias()

    def extra_repr(self) -> str:
        """Shape and rank, as `print(model)` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
