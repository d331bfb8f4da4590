"""Make a factored model ready to be rounded, without changing what it computes.

Pivoted forms hold rows or columns of a weight as they are and combine the others from them: a rounding error of the
former runs through all of the latter. They are converted to the two factors of the same matrix, which take k^2 more
numbers and round well. Then the factors are balanced and their space is rotated (:mod:`eckart.linalg.balance`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.errors import UsageError
from eckart.forms import FactoredLinear, form_named
from eckart.forms.base import copy_into
from eckart.forms.transformers_internals import has_adapters
from eckart.linalg import balance_for_rounding
from eckart.model import dense_module, factored_modules, replace_module, share_parameters
from eckart.quantization.kinds import check_kind


def prepare(model: PreTrainedModel, kind: str, dtype: torch.dtype | None = None) -> list[str]:
    """Convert forms that do not survive rounding, and balance the factors of all others; in place.

    What the model computes stays as it is, up to the rounding of its own type. Tensors get new numbers in new
    parameters: a clone that shares them keeps its own.

    Args:
        model: any model; one without factors stays as it is.
        kind: what is to follow, one of :data:`KINDS`. The measured best is the same for all of them.
        dtype: of the new factors; None for the type that the model has. Whoever rounds them next may take a wider one,
            and so rounds once.

    Returns:
        Notes for a report: what was converted, and what that costs in numbers.

    Raises:
        UsageError: the kind is unknown, or adapters are on the model.
    """
    check_kind(kind)
    if has_adapters(model):
        raise UsageError(
            f"{type(model).__name__} has adapters, which cannot be rounded with it. Merge them first: "
            "model.merge_and_unload()."
        )
    converted: Counter[tuple[str, str]] = Counter()
    added = 0
    for group in _groups(model):
        form, before = group[0][1].form, _count([module for _, module in group])
        now = _round_ready(model, group, dtype)
        if now != form:
            converted[form, now] += len(group)
            added += _count([model.get_submodule(name) for name, _ in group]) - before
    changed = [f"{count} of form {form} are now {now}" for (form, now), count in converted.items()]
    if not changed:
        return []
    return [f"weights that would not survive rounding: {', '.join(changed)}; that is {added:+,} numbers"]


Group = list[tuple[str, FactoredLinear]]


def _groups(model: nn.Module) -> list[Group]:
    """Factored weights with their names, those that hold one input factor together; most are alone."""
    groups: dict[int, Group] = {}
    for name, module in factored_modules(model).items():
        if isinstance(module, FactoredLinear):
            held = module.held_parameter()
            groups.setdefault(id(module if held is None else held), []).append((name, module))
    return list(groups.values())


def _round_ready(model: nn.Module, group: Group, dtype: torch.dtype | None) -> str:
    """Convert and balance the weights of a group; returns their form afterwards."""
    first = group[0][1]
    factors = [found for _, module in group if (found := module.two_factors()) is not None]
    if len(factors) < len(group):
        return first.form
    right = factors[0][1]  # all have the same
    if first.rounded_as is None:
        lefts, right = balance_for_rounding([left for left, _ in factors], right)
        for (_, module), left in zip(group, lefts, strict=True):
            _store(module, left, right, None, dtype)
        _share(model, group)
        return first.form
    outputs = sum(module.out_features for _, module in group)
    if first.rank * (outputs + first.in_features) >= outputs * first.in_features:
        for name, module in group:
            replace_module(model, name, dense_module(module))
        return "dense"
    lefts, right = balance_for_rounding([left for left, _ in factors], right)
    kind = form_named(first.rounded_as)
    converted: Group = []
    for (name, module), left in zip(group, lefts, strict=True):
        stored = next(module.parameters())
        new = kind.empty(
            module.out_features, module.in_features, module.rank, bias=module.has_bias, source=module.source,
            dtype=stored.dtype, device=stored.device,
        )  # fmt: skip
        _store(new, left, right, module.dense_bias(), dtype)
        new.requires_grad_(stored.requires_grad)
        replace_module(model, name, new)
        converted.append((name, new))
    _share(model, converted)
    return kind.form


def _store(module: FactoredLinear, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> None:
    """Put B and A into new parameters, and the bias where there is a new one."""
    for part, value in (("first", right), ("second", left)):
        leaf = module.get_submodule(part)
        old = leaf.get_parameter("weight")
        new = torch.empty_like(old, dtype=dtype)
        copy_into(new, value, f"{part} factor")
        leaf.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    if bias is not None:
        copy_into(module.get_submodule("second").get_parameter("bias"), bias, "bias")


def _share(model: nn.Module, group: Group) -> None:
    """Make the input factors of a group one parameter."""
    (first, _), *others = group
    share_parameters(model, {f"{other}.first.weight": f"{first}.first.weight" for other, _ in others})


def _count(group: Sequence[nn.Module]) -> int:
    """Numbers that modules store, a shared one once."""
    tensors = [tensor for module in group for tensor in module.state_dict(keep_vars=True).values()]
    return sum({id(tensor): tensor.numel() for tensor in tensors}.values())
