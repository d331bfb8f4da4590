"""What every stored form shares, of a Linear's weight or of a table of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from eckart.errors import UsageError
from eckart.forms.quantized import QuantizedLinear


@dataclass(frozen=True)
class StoredSize:
    """What a stored weight costs. The bias is counted apart: it is there before and after.

    Attributes:
        parameters: stored elements, integer indices included.
        multiply_adds: per token.
        index_elements: how many of `parameters` are integers (4 bytes each, whatever the dtype).
    """

    parameters: int
    multiply_adds: int
    index_elements: int = 0

    def bytes(self, dtype: torch.dtype) -> int:
        """Stored bytes when the floating-point numbers are of `dtype`."""
        return (self.parameters - self.index_elements) * dtype.itemsize + 4 * self.index_elements


class Factored(nn.Module):
    """A module that holds a weight in a stored form, wherever the weight stood.

    Attributes:
        form: the form's name.
        sizes: names of the whole numbers that say how large it is: arguments of `__init__`, attributes, and entries of
            the spec.
        no_dense: why no ordinary module can stand for it; None where one can.
        paper: authors, year, identifier.
        use: when to take it, in words, for its page in the documentation.
        lean: do without working memory, where many such modules run and few may be in memory at a time.
    """

    form: ClassVar[str]
    sizes: ClassVar[tuple[str, ...]]
    no_dense: ClassVar[str | None] = None
    paper: ClassVar[str] = ""
    use: ClassVar[str] = ""
    lean: bool = False

    def __init__(self) -> None:
        super().__init__()
        # A checkpoint of ours, opened by transformers without eckart, must fail instead of filling the
        # missing dense weight with random numbers: an empty tensor sits under the dense weight's key.
        self.register_state_dict_post_hook(_write_guard)
        self.register_load_state_dict_pre_hook(_drop_guard)
        self.register_load_state_dict_post_hook(_refresh)

    @classmethod
    def options(cls, spec: dict[str, Any]) -> dict[str, Any]:
        """What `__init__` takes besides the sizes, read and checked from a spec."""
        return {}

    def to_dense(self) -> Tensor:
        """W', (out, in) or (vocabulary, width), in the module's dtype, computed in float32 at least."""
        raise NotImplementedError

    def dense(self) -> nn.Module:
        """The ordinary module that this one stands for."""
        raise NotImplementedError

    def multiply_adds(self) -> int:
        """Multiply-adds per token."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Make anew what is derived from stored tensors: whoever fills a module calls it, if not by `load_state_dict`.

        Turning to training or evaluation does so too.
        """

    def find_damage(self) -> str | None:
        """What is wrong with stored indices, in words; None where there are none, or they are what they can be."""
        return None

    def train(self, mode: bool = True) -> Self:
        """As of any module; also :meth:`refresh`."""
        self.refresh()
        return super().train(mode)

    def __setattr__(self, name: str, value: Any) -> None:
        """As of any module; a weight or bias that the factors make is not set, unless to what it is.

        Who puts a module in another's place hands both on, as peft does when it takes its adapters off.
        """
        if isinstance(getattr(type(self), name, None), property) and name in ("weight", "bias"):
            own = getattr(self, name)
            if value is own or (value is not None and own is not None and torch.equal(value, own)):
                return
            raise AttributeError(f"{name} of the form {self.form} is made of its factors: set those, or call store().")
        super().__setattr__(name, value)

    def spec(self) -> dict[str, Any]:
        """All that :func:`eckart.forms.build` needs to rebuild the module, as JSON values."""
        return {"form": self.form} | {name: getattr(self, name) for name in self.sizes}


def describe_bad_order(order: Tensor) -> str | None:
    """What is wrong with an index that must name every place once; None for an order, or for one without numbers."""
    if order.is_meta or torch.equal(torch.sort(order.long()).values, torch.arange(len(order), device=order.device)):
        return None
    return f"order does not name each of 0..{len(order) - 1} once"


def _write_guard(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Mapping[str, Any]) -> None:
    # On the CPU always: an offloaded leaf is on meta, and a meta tensor cannot be saved.
    state[prefix + "weight"] = torch.empty(0, dtype=number_type(module).dtype)


def _drop_guard(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    guard = state.get(prefix + "weight")
    if guard is not None and guard.numel() == 0:
        del state[prefix + "weight"]


def _refresh(module: nn.Module, _: Any) -> None:
    if isinstance(module, Factored):
        module.refresh()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which two stored factors are multiplied: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def copy_into(target: Tensor, value: Tensor, where: str) -> None:
    """Round `value` into a stored tensor, and refuse a cast that overflows.

    Raises:
        UsageError: if a finite value is out of the range of the target's dtype.
    """
    value = value.detach()
    largest = float(value.abs().amax()) if value.numel() else 0.0
    if not largest <= torch.finfo(target.dtype).max:  # NaN is refused too
        raise UsageError(
            f"{where}: a factor of magnitude {largest:.3g} does not fit {target.dtype}; "
            "store in bfloat16 or float32 with --dtype."
        )
    with torch.no_grad():
        target.copy_(value)


def number_type(module: nn.Module) -> Tensor:
    """A tensor of the type and on the device that a module's own weight would have: of its first leaf."""
    for part in module.modules():
        if isinstance(part, QuantizedLinear):
            return part.get_buffer("computes")
        for parameter in part.parameters(recurse=False):
            return parameter
    raise AssertionError("a form without a leaf")


def numbers_of(leaf: nn.Module) -> Tensor:
    """The parameter that holds the weight of a leaf: of a quantized one, its integers."""
    return leaf.qdata if isinstance(leaf, QuantizedLinear) else leaf.weight  # type: ignore[return-value]


def is_plain_linear(leaf: nn.Module, *, fake: bool = False) -> bool:
    """Whether nothing else than its own `forward` runs when a linear leaf is called: no adapter, hook or offloader.

    Args:
        leaf: of a stored form.
        fake: whether its weight may be a fake tensor, as it is while the model is exported.
    """
    return (
        type(leaf) in (nn.Linear, QuantizedLinear)
        and (fake or type(numbers_of(leaf)) is nn.Parameter)  # where others have quantized it, its type is theirs
        and "forward" not in vars(leaf)
        and not leaf._forward_hooks
        and not leaf._forward_pre_hooks
    )
