"""What a model stores and computes: numbers, bytes and multiply-adds, three columns never mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.errors import UsageError
from eckart.forms import FactoredLinear
from eckart.forms.quantized import QuantizedLinear


@dataclass(frozen=True)
class Size:
    """Three costs.

    Attributes:
        elements: Stored numbers, integers included; what is tied counts once.
        bytes: The same in bytes.
        multiply_adds: Per token, of linear layers alone.
    """

    elements: int = 0
    bytes: int = 0
    multiply_adds: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the three numbers for a report."""
        return {"elements": self.elements, "bytes": self.bytes, "multiply_adds": self.multiply_adds}


@dataclass(frozen=True)
class Sizes:
    """Costs of a model and of some of its modules.

    Attributes:
        model: The whole model.
        named: The named modules together: what they tie among each other counts once.
        modules: Each of them, by name.
    """

    model: Size
    named: Size = field(default_factory=Size)
    modules: dict[str, Size] = field(default_factory=dict)


def count_sizes(model: nn.Module, names: Iterable[str] = (), dtype: torch.dtype | None = None) -> Sizes:
    """Count what a model stores and computes.

    Stored is what its state dict holds: parameters and persistent buffers, each tensor once however many names it
    has. Multiply-adds are per token: in x out for every Linear and Conv1D (a tied head included), what a factored
    module says of itself, 0 for embeddings and for everything else: attention scores, norms, convolutions, experts
    that are stored as one 3-D parameter. A product that several modules share (form joint) counts once. In an
    encoder-decoder a token passes one of the two sides; both are counted.

    Args:
        model: The model.
        names: Modules to count apart.
        dtype: Count floating-point numbers as if stored in this type: that of the checkpoint, where the model is
            held in another one for computing. None for the type they are held in.

    Returns:
        The sizes.

    Raises:
        UsageError: If there is no module of a name.
    """
    known = dict(model.named_modules())
    parts = {}
    for name in names:
        if name not in known:
            raise UsageError(f"module {name!r} is not in the model: pass names from model.named_modules()")
        parts[name] = known[name]
    return Sizes(
        _size([model], dtype),
        _size(parts.values(), dtype),
        {name: _size([module], dtype) for name, module in parts.items()},
    )


def measure_multiply_adds(model: nn.Module, run: Callable[[], Any]) -> int:
    """Multiply-adds of linear layers in what a function runs, of the rows and tokens that are computed, padding too.

    Args:
        model: linear layers are counted as in :func:`count_sizes`; what several of them compute once counts for each.
        run: makes passes.
    """
    total = 0

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal total
        total += _multiply_adds(module) * (args[0].numel() // args[0].shape[-1])

    handles = [module.register_forward_pre_hook(count) for module in {id(m): m for m in _computing(model)}.values()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return total


def _size(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> Size:
    stored: dict[Any, Tensor] = {}
    halves: dict[Any, int] = {}  # two numbers in a byte
    scales: set[Any] = set()  # which keep their type
    computing: dict[int, nn.Module] = {}
    for module in modules:
        for value in module.state_dict(keep_vars=True).values():
            if isinstance(value, Tensor) and value.numel():
                stored.setdefault(_identity(value), value)
        for part in module.modules():
            if isinstance(part, QuantizedLinear):
                halves[_identity(part.qdata)] = part.in_features * part.out_features - part.qdata.numel()
                scales.add(_identity(part.scale))
        computing |= {id(part): part for part in _computing(module)}
    return Size(
        elements=sum(value.numel() for value in stored.values()) + sum(halves.values()),
        bytes=sum(
            value.numel() * _element_size(value, None if key in scales else dtype) for key, value in stored.items()
        ),
        multiply_adds=sum(_multiply_adds(part) for part in computing.values()) - _computed_again(computing.values()),
    )


def _element_size(value: Tensor, dtype: torch.dtype | None) -> int:
    return dtype.itemsize if dtype is not None and value.is_floating_point() else value.element_size()


def _identity(value: Tensor) -> Any:
    """Return what tells a tensor from its copies but not from its other names."""
    if value.device.type == "meta":
        return id(value)
    return value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype


def _computing(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that say or show what they compute; the leaves of one that says so belong to it."""
    if _says_so(module) or isinstance(module, nn.Linear | Conv1D):
        yield module
        return
    for child in module.children():
        yield from _computing(child)


def _says_so(module: nn.Module) -> bool:
    return callable(getattr(type(module), "multiply_adds", None))


def _multiply_adds(module: nn.Module) -> int:
    if _says_so(module):
        own: Any = module
        return int(own.multiply_adds())
    weight = module.weight
    return weight.numel() if isinstance(weight, Tensor) else 0


def _computed_again(modules: Iterable[nn.Module]) -> int:
    """Return the multiply-adds that modules say of themselves and that others of them have done for them."""
    seen: set[Any] = set()
    again = 0
    for module in modules:
        if not isinstance(module, FactoredLinear) or module.shared_by != "input":
            continue
        if (held := module.held_parameter()) is not None:
            shared = _identity(held)
            again += module.shared_elements(module.in_features, module.rank) if shared in seen else 0
            seen.add(shared)
    return again
