"""A linear layer whose weight is stored in few bits: what stands for a leaf of a form, or for a dense layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eckart.errors import UsageError
from eckart.forms.lazy import LazyWeight

SOURCES = ("linear", "conv1d")


class QuantizedLinear(nn.Module):
    """`y = x (q s)^T + b` with integers q and their scales s: stored as such, computed by torchao.

    In 8 bits an output has one scale, in float32; in 4 bits each group of `group` numbers of a row has one, in float16,
    and two numbers are stored in a byte. Numbers are symmetric about 0.

    Scales keep their type when a model is cast. The class is no Linear, so that nothing trains its numbers or merges
    into them by mistake.

    Attributes:
        in_features: n.
        out_features: m.
        bits: 8 or 4.
        dynamic: whether inputs are rounded too while it runs, to 8 bits with a scale for each token.
        group: numbers of a row that share a scale; None for all.
        source: "linear" or "conv1d", what it stands for.
        qdata: q, (m, n) int8; or (m, ceil(n / 2)) uint8, of two numbers each.
        scale: s, (m, 1) or (m, n / group).
    """

    qdata: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter | None
    computes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 8,
        dynamic: bool = False,
        group: int | None = None,
        source: str = "linear",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        valid = isinstance(group, int) and not isinstance(group, bool) and group > 0 and in_features % group == 0
        if bits not in (8, 4) or (bits == 4) != valid or (bits == 8 and group is not None) or source not in SOURCES:
            raise UsageError(
                f"quantized layer of {out_features} x {in_features}: {bits} bits, groups of {group}, source {source!r} "
                "are not possible together; take 8 bits, or 4 with groups that divide a row."
            )
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.dynamic, self.group, self.source = bits, dynamic, group, source
        columns = in_features if bits == 8 else -(-in_features // 2)
        integers = torch.empty(out_features, columns, dtype=torch.int8 if bits == 8 else torch.uint8)
        scales = torch.empty(
            out_features, in_features // (group or in_features), dtype=torch.float32 if bits == 8 else torch.float16
        )
        self.qdata = nn.Parameter(integers, requires_grad=False)
        self.scale = nn.Parameter(scales, requires_grad=False)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None)
        # Empty: its type is the one that the layer computes in, and it follows where the module is cast or moved.
        self.register_buffer("computes", torch.empty(0, dtype=dtype), persistent=False)
        self._prepared: tuple[tuple[object, ...], Tensor] | None = None
        self.register_state_dict_post_hook(_write_guard)
        self.register_load_state_dict_pre_hook(_drop_guard)

    @classmethod
    def of(
        cls,
        integers: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        dynamic: bool = False,
        group: int | None = None,
        source: str = "linear",
        dtype: torch.dtype,
    ) -> QuantizedLinear:
        """The layer of numbers that have been rounded.

        Args:
            integers: (m, n), int8; in -8..7 where there are groups.
            scale: (m, 1) or (m, n / group).
            bias: (m,) or None.
            dynamic: see the class.
            group: see the class.
            source: see the class.
            dtype: the type to compute in.
        """
        rows, columns = integers.shape
        with torch.device("meta"):
            made = cls(
                columns, rows, bias is not None, bits=4 if group else 8, dynamic=dynamic, group=group, source=source,
                dtype=dtype,
            )  # fmt: skip
        made.computes = torch.empty(0, dtype=dtype, device=integers.device)
        stored = pack_nibbles(integers) if group else integers
        made.qdata = nn.Parameter(stored.contiguous(), requires_grad=False)
        made.scale = nn.Parameter(scale.to(made.scale.dtype).contiguous(), requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return made.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""
        return self.computes.dtype

    def integers(self) -> Tensor:
        """q, (m, n), int8."""
        return unpack_nibbles(self.qdata, self.in_features) if self.bits == 4 else self.qdata.detach()

    def dequantized(self) -> Tensor:
        """`q s`, (m, n), in the type that it computes in."""
        blocks = self.integers().float().unflatten(1, (self.scale.shape[1], -1))  # (m, groups, group)
        return (blocks * self.scale.detach().float()[..., None]).flatten(1).to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """The rounded weight as floating-point numbers, computed when something reads its values."""
        flip = self.source == "conv1d"

        def dense() -> Tensor:
            return self.dequantized().mT if flip else self.dequantized()

        shape = (self.out_features, self.in_features)
        return LazyWeight.of(dense, shape[::-1] if flip else shape, self.computes)

    def multiply_adds(self) -> int:
        """Multiply-adds per token: as many as before."""
        return self.in_features * self.out_features

    def spec(self) -> dict[str, Any]:
        """What the description of a checkpoint says of this layer beside the kind of all; often nothing."""
        return ({"group": self.group} if self.group else {}) | (
            {"source": self.source} if self.source != "linear" else {}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., n), giving (..., m)."""
        return functional.linear(x, self._weight(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Shape and kind, as `print(model)` shows them."""
        how = f"int{self.bits}{'-dynamic' if self.dynamic else ''}{f', group={self.group}' if self.group else ''}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {how}"

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """The weight as torchao's tensor, which has the kernels; made when first used, of the same memory in 8 bits."""
        stored = (self.qdata, self.scale)
        key = (dtype, *((t.data_ptr(), t.device, None if t.is_inference() else t._version) for t in stored))
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = key, torchao_weight(self, dtype)
        return self._prepared[1]

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        self._prepared = None
        scale = self.scale.data
        found = super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # cast with the rest of a model: they keep their digits
            self.scale.data = scale.to(self.scale.device)
        return found

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_prepared": None}


def torchao_weight(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """The stored numbers as a tensor of torchao.

    Raises:
        UsageError: torchao is missing.
    """
    try:
        from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
    except ImportError:
        raise UsageError(
            "a quantized layer needs torchao, which is not installed: pip install 'eckart[quant]'"
        ) from None
    if layer.bits == 8:
        inputs = QuantizeTensorToInt8Kwargs(granularity=PerRow()) if layer.dynamic else None
        block = [1, layer.in_features]
        return Int8Tensor(layer.qdata.detach(), layer.scale.detach(), block, dtype, act_quant_kwargs=inputs)
    scale = layer.scale.detach().float()
    zeros = torch.zeros_like(scale, dtype=torch.int8)
    assert layer.group is not None
    return IntxUnpackedToInt8Tensor(layer.integers(), scale, zeros, torch.int4, (1, layer.group), dtype, None)  # type: ignore[attr-defined]


def pack_nibbles(integers: Tensor) -> Tensor:
    """Numbers in -8..7, (m, n), two to a byte: (m, ceil(n / 2)), the first in the lower half."""
    shifted = functional.pad((integers.to(torch.int16) + 8).to(torch.uint8), (0, integers.shape[1] % 2))
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Undo :func:`pack_nibbles`: (m, columns), int8."""
    both = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :columns]
    return both.to(torch.int8) - 8


def _write_guard(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Mapping[str, Any]) -> None:
    # As forms do: transformers without eckart must stop at the missing dense weight, not draw random numbers for it.
    state[prefix + "weight"] = torch.empty(0, dtype=torch.float32)


def _drop_guard(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    state.pop(prefix + "weight", None)
