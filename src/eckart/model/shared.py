"""One parameter used by several modules: share, find and unshare.

transformers ties by name the parameters that a model's class declares. Here any two parameters may be shared: both
modules hold the same object, and the module with the later name has an attribute that tells ``save_pretrained`` to
leave it out of the file. So sharing survives copies, casts and the replacement of modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from eckart.errors import ModelError
from eckart.forms import FactoredLinear
from eckart.forms.transformers_internals import TIES, own_ties, set_own_ties


def share_parameters(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Replace the parameter of each target by that of its source.

    Args:
        model: changed in place.
        ties: target -> source, names of parameters. A source comes before its targets in `named_parameters()`.

    Raises:
        ModelError: if two shapes differ; the ties before these are made.
    """
    for target, source in ties.items():
        owner, key = parameter_owner(model, target)
        one, other = model.get_parameter(source), owner._parameters[key]
        if other is None or one.shape != other.shape or isinstance(owner, PreTrainedModel):
            shapes = f"{tuple(one.shape)} and {None if other is None else tuple(other.shape)}"
            raise ModelError(
                f"{target} cannot share {source}: their shapes are {shapes}. Share parameters of one shape."
            )
        owner._parameters[key] = one
        # transformers reads this from every module when it saves, but ties again only those of a `PreTrainedModel`.
        set_own_ties(owner, {**(own_ties(owner) or {}), key: source})
    _count_sharers(model)


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """Target -> source of the ties that :func:`share_parameters` made and that still hold.

    The source is the first name of the parameter in the model.
    """
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
    """Give every target a copy of its own, in place."""
    for target in shared_parameters(model):
        owner, key = parameter_owner(model, target)
        parameter = model.get_parameter(target)
        owner._parameters[key] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            vars(module).pop(TIES, None)
    _count_sharers(model)


def parameter_owner(model: nn.Module, parameter: str) -> tuple[Any, str]:
    """The module that holds a parameter, and the parameter's name there."""
    name, _, key = parameter.rpartition(".")
    return model.get_submodule(name), key


def _count_sharers(model: nn.Module) -> None:
    """Tell each module of a form that shares how many hold the parameter that it shares."""
    groups: dict[int, list[FactoredLinear]] = {}
    for module in model.modules():
        if isinstance(module, FactoredLinear) and (held := module.held_parameter()) is not None:
            groups.setdefault(id(held), []).append(module)
    for group in groups.values():
        for module in group:
            module.sharers = len(group)
