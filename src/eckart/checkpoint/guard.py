"""An empty tensor under the name of a shared parameter, where nothing else keeps transformers alone from loading it.

Without eckart, transformers only warns of the tensors that a checkpoint with shared parameters leaves out, and draws
them at random. One of another shape than it expects makes it stop. Stored forms write such a tensor themselves; a model
of dense modules needs one beside its ties.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eckart.model.shared import parameter_owner

GUARDED = "_guarded"


def guard_of(ties: Mapping[str, str]) -> str | None:
    """Which target's name the empty tensor stands under."""
    return min(ties, default=None)


def set_guard(model: nn.Module, name: str | None) -> None:
    """Let the model's state dict hold an empty tensor under a target's name, and under no other; None for none."""
    for module in model.modules():
        vars(module).pop(GUARDED, None)
    if name is None:
        return
    owner, key = parameter_owner(model, name)
    setattr(owner, GUARDED, key)
    if _write not in owner._state_dict_hooks.values():
        owner.register_state_dict_post_hook(_write)
        owner.register_load_state_dict_pre_hook(_drop)


def _write(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    key = vars(module).get(GUARDED)
    if key is not None and (prefix + key) in state:
        state[prefix + key] = torch.empty(0, dtype=state[prefix + key].dtype)


def _drop(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    key = vars(module).get(GUARDED)
    if key is not None and (guard := state.get(prefix + key)) is not None and guard.numel() == 0:
        parameter = module._parameters[key]
        assert parameter is not None
        state[prefix + key] = parameter.detach()  # which the source's numbers come into
