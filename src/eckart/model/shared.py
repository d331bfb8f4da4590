"""Parameters of several modules that are one: made, found again, and taken apart.

transformers ties by name what the class of a model declares. Here any two parameters may be one. Which are shows in the
model itself, where two modules hold the same object; the module that holds the later name carries a mark beside it,
the one by which ``save_pretrained`` leaves a name out of the file. Copies, casts and replaced modules need no care.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from eckart.errors import ModelError
from eckart.forms.transformers_internals import TIES, own_ties, set_own_ties


def share_parameters(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Let the parameter of each target be that of its source.

    Args:
        model: changed in place.
        ties: target -> source, names of parameters. A source comes before its targets in `named_parameters()`.

    Raises:
        ModelError: naming two parameters that cannot be one; those before them are.
    """
    for target, source in ties.items():
        owner, key = parameter_owner(model, target)
        one, other = model.get_parameter(source), owner._parameters[key]
        if other is None or one.shape != other.shape or isinstance(owner, PreTrainedModel):
            shapes = f"{tuple(one.shape)} and {None if other is None else tuple(other.shape)}"
            raise ModelError(f"{target} cannot be {source}: their shapes are {shapes}. Share parameters of one shape.")
        owner._parameters[key] = one
        # transformers reads it from every module when it saves; it ties again only on a `PreTrainedModel`.
        set_own_ties(owner, {**(own_ties(owner) or {}), key: source})


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """Target -> source of what :func:`share` has made and still holds; the source is the first name of all."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(id(parameter), name)
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            continue
        for key in own_ties(module) or ():
            parameter = module._parameters.get(key)
            target = f"{name}.{key}"
            if parameter is not None and first[id(parameter)] != target:
                found[target] = first[id(parameter)]
    return found


def unshare_parameters(model: nn.Module) -> None:
    """Give every target numbers of its own, in place: those that it has."""
    for target in shared_parameters(model):
        owner, key = parameter_owner(model, target)
        parameter = model.get_parameter(target)
        owner._parameters[key] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            vars(module).pop(TIES, None)


def parameter_owner(model: nn.Module, parameter: str) -> tuple[Any, str]:
    """The module that holds a parameter, and the parameter's name there."""
    name, _, key = parameter.rpartition(".")
    return model.get_submodule(name), key
