"""A second module tree over the same tensors: two models for the memory of one."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from eckart.errors import NumericalError
from eckart.forms.quantized import QuantizedLinear
from eckart.forms.transformers_internals import modules_kept_in_float32

M = TypeVar("M", bound=nn.Module)


def shared_clone(model: M) -> M:
    """Copy the modules of a model and share the storage of its parameters and buffers.

    Replacing modules of the copy, casting it or moving it to another device (`shared_clone(model).to(device)`) leaves
    the original as it is; tied parameters stay tied. Writing into a shared tensor in place changes both. Tensors mapped
    from files stay mapped, and take no memory.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


def unshare_storage(model: nn.Module, original: nn.Module) -> None:
    """Copy every tensor that a clone still shares with the original, so that training one does not change the other.

    The copies are in memory, also those of tensors mapped from files.

    Args:
        model: made by :func:`shared_clone`; changed in place, tied parameters stay tied.
        original: the model that it was cloned from.
    """
    theirs = {tensor.data_ptr() for tensor in (*original.parameters(), *original.buffers())}
    for parameter in model.parameters():
        if parameter.data_ptr() in theirs:
            parameter.data = parameter.data.clone()
    copies: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.data_ptr() in theirs:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())


def cast(
    model: nn.Module, dtype: torch.dtype, *, changed: Callable[[nn.Module, str], None] = lambda module, name: None
) -> None:
    """Convert the floating-point numbers of a model that are saved to a type, in place, as ``from_pretrained`` would.

    Buffers that are not saved (the frequencies of rotary embeddings) keep their type, and so do the modules that the
    model's class keeps in float32: ``model.to(dtype)`` rounds both, and then differs from the model loaded again.

    Args:
        model: the model.
        dtype: the type.
        changed: called with each module whose own tensors were converted, and its name, before the next one is
            converted: for a model that is larger than memory, it moves them to a file.

    Raises:
        NumericalError: if a value is out of the type's range; the message names the tensor.
    """
    kept = modules_kept_in_float32(model, half=dtype == torch.float16)
    pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in sorted(kept))) if kept else None
    for prefix, module in model.named_modules():
        before = _types(module)
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if name.rpartition(".")[2] == "scale" and isinstance(module, QuantizedLinear):
                continue  # cast, it would lose digits of every number of its row
            if parameter.is_floating_point() and not (pattern and pattern.search(name)):
                largest = float(parameter.detach().abs().amax()) if parameter.numel() else 0.0
                if not largest <= torch.finfo(dtype).max:
                    raise NumericalError(
                        f"{name}: a value of magnitude {largest:.3g} does not fit {dtype}; "
                        "store in bfloat16 or float32 with --dtype."
                    )
                parameter.data = parameter.data.to(dtype)
        if isinstance(module, QuantizedLinear):
            module.computes = module.computes.to(dtype)
        for name, buffer in module._buffers.items():
            stored = (
                buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set
            )
            if stored and buffer is not None and not (pattern and pattern.search(f"{prefix}.{name}")):
                module._buffers[name] = buffer.to(dtype)
        if _types(module) != before:
            changed(module, prefix)


def _types(module: nn.Module) -> list[torch.dtype | None]:
    own = (*module._parameters.values(), *module._buffers.values())
    return [None if tensor is None else tensor.dtype for tensor in own]
