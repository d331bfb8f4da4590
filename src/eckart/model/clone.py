"""A second module tree over the same tensors: two models for the memory of one."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def shared_clone(model: M) -> M:
    """Copy the modules of a model and share the storage of its parameters and buffers.

    Replacing modules in the copy, or casting it, leaves the original as it is; ties stay ties. Writing into a
    shared tensor in place would be seen by both.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)
