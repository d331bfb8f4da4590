"""Replace dense modules by factored ones, and factored ones by dense ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.errors import ModelError, UsageError
from eckart.forms import Block, Factored, FactoredLinear, LowRank, build, form_named
from eckart.model.attention_heads import pruned_heads
from eckart.model.shared import shared_parameters, unshare_parameters
from eckart.model.sites import Site
from eckart.model.slicing import ATTRIBUTE, SlicedFeatures, sliced_features
from eckart.model.slicing import FORM as SLICED
from eckart.model.ties import tie_dense

DENSE = "dense"
"""Takes the place of a form's name for an ordinary module."""


def store_factors(
    site: Site,
    form: str,
    rank: int,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    block: Block | None = None,
) -> tuple[FactoredLinear, str | None]:
    """Store `W' = left @ right` in a form; as low rank if the form cannot hold it.

    Args:
        site: the weight that is replaced.
        form: name of the form.
        rank: k.
        left: B, (out, k).
        right: A, (k, in).
        bias: (out,) or None.
        dtype: of the stored numbers.
        block: shape of the form's blocks; then the factors are those of the rearranged weight.

    Returns:
        The module, and the reason of a fallback or None. The fallback is low rank, at the largest rank that stores
        no more numbers than the form would.
    """
    kind = form_named(form)
    common: dict[str, Any] = {"bias": bias is not None, "source": site.source, "dtype": dtype, "device": left.device}
    module = kind.empty(*site.shape, rank, block=block, **common)
    reason = _try_store(module, site, left, right, bias)
    if reason is None:
        return module.eval(), None
    stored = kind.size(*site.shape, rank, block).parameters
    smaller = min(rank, max(1, stored // (site.out_features + site.in_features)))
    fallback = LowRank.empty(*site.shape, smaller, **common)
    _try_store(fallback, site, left[:, :smaller], right[:smaller], bias)
    return fallback.eval(), f"{site.name}: {reason}; stored low-rank at rank {smaller} instead of {rank}"


def _try_store(module: FactoredLinear, site: Site, left: Tensor, right: Tensor, bias: Tensor | None) -> str | None:
    try:
        return module.store(left, right, bias)
    except UsageError as error:
        raise UsageError(f"{site.name}: {error}") from None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name`, and at every other name of the module that was there."""
    old = model.get_submodule(name)
    names = [other for other, child in model.named_modules(remove_duplicate=False) if child is old]
    module.train(old.training)
    for other in names:
        model.set_submodule(other, module)


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in place of others for a while.

    Args:
        model: the model to change.
        modules: name -> what takes its place.

    Yields:
        Nothing.
    """
    before = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        replace_module(model, name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            replace_module(model, name, module)


def set_dense_weight(model: nn.Module, name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Change the numbers of a Linear or Conv1D, in a new module: clones that share its tensors keep theirs.

    Args:
        model: the model to change.
        name: the module.
        weight: (out, in).
        bias: (out,) or None.
    """
    old = model.get_submodule(name)
    dtype = old.weight.dtype
    assert isinstance(dtype, torch.dtype)
    trains = bool(old.weight.requires_grad)
    new = copy.copy(old)
    new._parameters = dict(old._parameters)
    oriented = weight.mT.contiguous() if isinstance(old, Conv1D) else weight
    new.weight = nn.Parameter(oriented.to(dtype), requires_grad=trains)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(dtype), requires_grad=trains)
    replace_module(model, name, new)


def serialize_module(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a module by name, and its spec as JSON, for :func:`deserialize_module`."""
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tensors |= {name: b for name, b in module.named_buffers() if name not in module._non_persistent_buffers_set}
    sliced: SlicedFeatures | None = getattr(module, ATTRIBUTE, None)
    if sliced is not None:
        return tensors, sliced.spec()
    return tensors, module.spec() if isinstance(module, Factored) else {"form": DENSE}


def deserialize_module(model: nn.Module, name: str, tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> None:
    """Put at a site what :func:`pack` took apart; the tensors are shared.

    Args:
        model: the model to change.
        name: the site.
        tensors: by name.
        spec: as it was packed.
    """
    old: Any = model.get_submodule(name)
    trains = any(parameter.requires_grad for parameter in old.parameters())
    if spec["form"] == SLICED:
        replace_module(model, name, SlicedFeatures.from_spec(spec).filled(old, tensors, trains=trains))
        return
    if spec["form"] == DENSE:
        new = copy.copy(old)
        new._parameters = dict(old._parameters)
    else:
        with torch.device("meta"):
            new = build(dict(spec)).eval()
    for path, tensor in tensors.items():
        where, _, key = path.rpartition(".")
        owner = new.get_submodule(where)
        if key in owner._buffers:
            owner._buffers[key] = tensor
        else:
            owner._parameters[key] = nn.Parameter(tensor, requires_grad=trains)
    if isinstance(new, Factored):
        new.refresh()
    replace_module(model, name, new)


def factored_modules(model: nn.Module) -> dict[str, Factored]:
    """Name -> factored module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Factored)}


def to_dense_modules(model: nn.Module) -> nn.Module:
    """Replace every factored module by the dense one with the same weight, in place; tied weights stay tied.

    Removed attention heads and neurons come back as zeros, and parameters that :func:`eckart.model.share_parameters`
    shared are copied to each module, so that the model's class can load the result.

    Raises:
        ModelError: if the model has nothing to make dense, or a module that is not a matrix; then nothing is changed.
    """
    factored = factored_modules(model)
    sliced = sliced_features(model)
    if not factored and not sliced and not pruned_heads(model) and not shared_parameters(model):
        raise ModelError(f"{type(model).__name__} holds no factored weight; there is nothing to make dense.")
    for name, module in factored.items():
        if module.no_dense is not None:
            raise ModelError(f"{name}: {module.no_dense}")
    unshare_parameters(model)
    for name, module in factored.items():
        replace_module(model, name, dense_module(module) if isinstance(module, FactoredLinear) else module.dense())
    tie_dense(model, factored)
    for name, features in sliced.items():
        replace_module(model, name, features.undo(model.get_submodule(name)))
    for name, pruned in pruned_heads(model).items():
        pruned.undo(model.get_submodule(name))
    return model


def dense_module(module: FactoredLinear) -> nn.Module:
    """The Linear or Conv1D with the same weight and bias."""
    weight, bias = module.to_dense().detach(), module.dense_bias()
    dense: nn.Module
    if module.source == "conv1d":
        with torch.device("meta"):
            dense = Conv1D(module.out_features, module.in_features)
        dense.weight = nn.Parameter(weight.mT.contiguous())
        dense.bias = nn.Parameter(torch.zeros_like(weight[:, 0]) if bias is None else bias.detach().clone())
    else:
        dense = nn.Linear(module.in_features, module.out_features, bias is not None, device="meta")
        dense.weight = nn.Parameter(weight)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().clone())
    return dense
