"""A second module tree over the same tensors: two models for the memory of one."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from eckart.errors import NumericalError
from eckart.forms.transformers_internals import modules_kept_in_float32

M = TypeVar("M", bound=nn.Module)


def shared_clone(model: M) -> M:
    """Copy the modules of a model and share the storage of its parameters and buffers.

    Replacing modules in the copy, or casting it, leaves the original as it is; ties stay ties. Writing into a
    shared tensor in place would be seen by both. Tensors that lie in files are shared there, and take no memory.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


def unshare_storage(model: nn.Module, original: nn.Module) -> None:
    """Copy every tensor that a clone still shares with the original: from here on, training one leaves the other alone.

    The copies are in memory, also of tensors that lie in files.

    Args:
        model: made by :func:`shared_clone`; changed in place, ties stay ties.
        original: what it was cloned from.
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
    """Bring a model's stored floating-point numbers to a type, in place, as ``from_pretrained(dtype=...)`` would.

    Buffers that are not stored (the frequencies of rotary embeddings) keep theirs, and so do the modules that the
    model's class keeps in float32: ``model.to(dtype)`` rounds both, and computes something else than the saved model.

    Args:
        model: the model.
        dtype: the type.
        changed: called with each module whose own tensors have another type now, and its name, before the next one is
            cast: for a model that is larger than memory, it moves them away.

    Raises:
        NumericalError: naming a tensor whose values are out of the type's range.
    """
    kept = modules_kept_in_float32(model, half=dtype == torch.float16)
    pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in sorted(kept))) if kept else None
    for prefix, module in model.named_modules():
        before = _types(module)
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.is_floating_point() and not (pattern and pattern.search(name)):
                largest = float(parameter.detach().abs().amax()) if parameter.numel() else 0.0
                if not largest <= torch.finfo(dtype).max:
                    raise NumericalError(
                        f"{name}: a value of magnitude {largest:.3g} does not fit {dtype}; "
                        "store in bfloat16 or float32 with --dtype."
                    )
                parameter.data = parameter.data.to(dtype)
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
