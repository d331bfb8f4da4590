"""Pivoted: the same rank-k matrix in k (m + n - k) numbers, and a forward that keeps the gain."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from eckart.forms.base import StoredSize, compute_dtype, copy_into, describe_bad_order, is_plain_linear
from eckart.forms.linear import Block, FactoredLinear
from eckart.linalg import pivoted_factors

# The largest |C| that is accepted: each of C's products amplifies the rounding of a pivot output by at
# most this much. Row exchanges normally bring it below 1.2; above the bound W' lacks full rank.
BOUND = 4.0

# Up to this many additional products per output, k^2 / m, an expanded readout costs less than putting the outputs in
# order; in half precision on a CPU it always does. Measured on a CPU: `benchmarks/forward_speed.py`. On a GPU by
# arithmetic: reading and writing an output once more takes the time of some hundred products.
EXPAND_BELOW = {
    ("cpu", torch.float32): 100.0,
    ("cpu", torch.bfloat16): math.inf,
    ("cpu", torch.float16): math.inf,
    ("cuda", torch.float32): 100.0,
    ("cuda", torch.bfloat16): 500.0,
    ("cuda", torch.float16): 500.0,
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What runs without calling the leaves as modules; others are not for speed."""


class Pivoted(FactoredLinear):
    """`h = P x + b_p`, `y = concat(h, C h + b_r)` in row order, stored as k (m + n - k) numbers and m row numbers.

    P (k, n), `first`, holds k rows of W' as they are; C (m - k, k), `second`, combines them into the
    others. The dense bias b folds in exactly: `b_p = b[pivots]`, `b_r = b[rest] - C b_p`.

    Putting m outputs in order costs as much as a product in half precision, so where that is the cheaper way and no
    gradient is asked for, layers run on an expanded readout `[I; C]` with its rows already in order: k^2 / m more
    products per output and no reordering. It is working memory of m k numbers, made at the first call and never stored.
    Elsewhere both products are written into one tensor and put in order by one gather. Its index is `inverse`, made
    when `order` is filled and never stored: no graph that is traced sorts anything.
    """

    form: ClassVar[str] = "pivoted"
    paper: ClassVar[str] = "Zhao et al., ICML 2025, arXiv 2501.19090"
    use: ClassVar[str] = (
        "Stored numbers count more than speed: a rank costs k^2 numbers less than in the low-rank form, and "
        "the forward pass is slower. --optimise size takes it."
    )
    rounded_as: ClassVar[str | None] = "lowrank"
    order: Tensor
    inverse: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, source: str = "linear"
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, source)
        self.first = nn.Linear(in_features, rank, bias=bias)
        self.second = nn.Linear(rank, out_features - rank, bias=bias)
        self.register_buffer("order", torch.zeros(out_features, dtype=torch.int32))
        # Where each output row stands among `concat(pivots, rest)`.
        self.register_buffer("inverse", torch.arange(out_features), persistent=False)
        self._inverse_of: tuple[object, ...] | None = None
        self._prepared: tuple[tuple[object, ...], Tensor, Tensor | None] | None = None

    @classmethod
    def size(cls, out_features: int, in_features: int, rank: int, block: Block | None = None) -> StoredSize:
        """k (m + n - k) numbers and multiply-adds, and the m row numbers of the order."""
        numbers = rank * (out_features + in_features - rank)
        return StoredSize(numbers + out_features, numbers, out_features)

    @classmethod
    def rank_multiple(cls, out_features: int, in_features: int, wanted: int) -> int:
        """One that m - k, the height of C, is a multiple of as well."""
        return math.gcd(wanted, out_features)

    def store(self, left: Tensor, right: Tensor, bias: Tensor | None) -> str | None:
        """Choose pivot rows and fill; refused when no choice keeps C within the bound."""
        factors = pivoted_factors(left, right)
        if not factors.bound <= BOUND:
            return f"max|C| = {factors.bound:.3g} of the pivoted form is above its bound {BOUND:g}"
        copy_into(self.first.weight, factors.pivots, "pivot rows")
        copy_into(self.second.weight, factors.rest, "pivoted coefficients")
        with torch.no_grad():
            self.order.copy_(factors.order)
        if bias is not None:
            pivot_bias = bias.double()[factors.order[: self.rank]]
            copy_into(self.first.bias, pivot_bias, "bias")
            # b_r is computed from what is stored of C and b_p, so that the folded bias is as exact as b.
            stored = self.second.weight.double() @ self.first.bias.double()
            copy_into(self.second.bias, bias.double()[factors.order[self.rank :]] - stored, "bias")
        self.refresh()
        return None

    def two_factors(self) -> tuple[Tensor, Tensor]:
        """`[I; C]` in row order, and P."""
        pivots, rest = self.first.weight.detach().double(), self.second.weight.detach().double()
        eye = torch.eye(self.rank, dtype=pivots.dtype, device=pivots.device)
        return torch.cat([eye, rest])[self._index()], pivots

    def to_dense(self) -> Tensor:
        """`[P; C P]` in row order."""
        dtype = compute_dtype(self.first.weight.dtype)
        pivots = self.first.weight.to(dtype)
        rows = torch.cat([pivots, self.second.weight.to(dtype) @ pivots])
        return rows[self._index()].to(self.first.weight.dtype)

    def dense_bias(self) -> Tensor | None:
        """`[b_p; b_r + C b_p]` in row order."""
        if self.first.bias is None:
            return None
        dtype = compute_dtype(self.first.weight.dtype)
        pivots = self.first.bias.to(dtype)
        both = torch.cat([pivots, self.second.bias.to(dtype) + self.second.weight.to(dtype) @ pivots])
        return both[self._index()].to(self.first.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., n), giving (..., m)."""
        if self._plain(x):
            hidden = self.first(x)
            both = torch.cat([hidden, self.second(hidden)], dim=-1)
            return both.index_select(-1, self._index())
        key, tensor, bias = self._prepare()
        if key[0] == "expanded":
            return functional.linear(functional.linear(x, self.first.weight), tensor, bias)
        return self._gathered(x, tensor)

    def find_damage(self) -> str | None:
        """The order must name every place once: another index would compute something else without a word."""
        return describe_bad_order(self.order)

    # -- the order of the outputs ----------------------------------------------------------------------

    def refresh(self) -> None:
        """Make the index of the outputs anew, and forget working memory.

        Some optimizers write to `.data`, which no version counts, so that nothing else shows it.
        """
        self._prepared = None
        if not self.order.is_meta:
            with torch.inference_mode(False):  # else gradients could not use it
                inverse = torch.argsort(self.order)
            old = self.inverse
            if old.device != inverse.device or old.is_inference() or not torch.equal(old, inverse):
                self.inverse = inverse
            self._inverse_of = self._state_of_order()

    def _index(self) -> Tensor:
        """(m,) where each output row stands among `concat(pivots, rest)`."""
        # A tracer has tensors without numbers: what has filled `order` has called :meth:`refresh`.
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(self.order) is not Tensor
        if not traced and self._inverse_of != self._state_of_order():
            self.refresh()
        return self.inverse

    def _state_of_order(self) -> tuple[object, ...]:
        """What shows that `order`, or what was made of it, has been changed or replaced."""
        both = (self.order, self.inverse)
        return tuple((t.data_ptr(), None if t.is_inference() else t._version, t.device) for t in both)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "order":
            self.refresh()

    # -- the forward without gradients ---------------------------------------------------------------

    def _stored(self) -> list[Tensor]:
        """Every tensor of the checkpoint."""
        tensors = (self.first.weight, self.second.weight, self.order, self.first.bias, self.second.bias)
        return [tensor for tensor in tensors if tensor is not None]

    def _plain(self, x: Tensor) -> bool:
        """Whether the leaves must be called as modules: gradients, tracing, autocast, adapters, offloading."""
        leaves = (self.first, self.second)
        return (
            self.lean
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch.is_autocast_enabled(x.device.type)
            or not all(is_plain_linear(leaf) for leaf in leaves)
            # Made in inference mode: changes leave no mark that the working memory could go by.
            or any(tensor.is_inference() for tensor in self._stored())
            or self.first.weight.dtype not in DTYPES
        )

    def _prepare(self) -> tuple[tuple[object, ...], Tensor, Tensor | None]:
        """The expanded readout, or the gather index; remade when a stored tensor has changed."""
        weight, rest = self.first.weight, self.second.weight
        bound = EXPAND_BELOW.get((weight.device.type, weight.dtype), 0.0)
        expanded = self.rank**2 < bound * self.out_features
        key = (
            "expanded" if expanded else "gathered",
            *((t.data_ptr(), t._version, t.dtype, t.device) for t in self._stored()),
            # A write through `.data` leaves no version: one number of what is expanded shows most of those. On a GPU
            # the look at it would wait for all that is under way.
            rest[0, 0].item() if expanded and rest.numel() and not rest.is_cuda else None,
        )
        if self._prepared is not None and self._prepared[0] == key:
            return self._prepared
        inverse = self._index()
        if expanded:
            eye = torch.eye(self.rank, dtype=rest.dtype, device=rest.device)
            prepared = torch.cat([eye, rest])[inverse].contiguous()
            self._prepared = (key, prepared, self.dense_bias())
        else:
            self._prepared = (key, inverse, None)
        return self._prepared

    def _gathered(self, x: Tensor, inverse: Tensor) -> Tensor:
        """Both products written into one buffer, then one gather: no concatenation."""
        flat = x.reshape(-1, self.in_features)
        both = flat.new_empty(flat.shape[0], self.out_features)
        head, tail = both[:, : self.rank], both[:, self.rank :]
        for leaf, source, out in ((self.first, flat, head), (self.second, head, tail)):
            if leaf.bias is None:
                torch.mm(source, leaf.weight.mT, out=out)
            else:
                torch.addmm(leaf.bias, source, leaf.weight.mT, out=out)
        # `gather` beats `index_select` on the last axis several times over.
        return both.gather(1, inverse.expand(flat.shape[0], -1)).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        found = super()._apply(fn, recurse)
        self.refresh()
        return found

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_prepared": None, "_inverse_of": None}
