"""Attention modules from which heads were removed.

A model's class builds every attention with the number of heads in its configuration, the same in all layers. If layers
keep different numbers, each of these modules has a :class:`PrunedHeads`, which is saved in the checkpoint's config.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.errors import UsageError

FORM = "heads"
"""Takes the place of a form's name for an attention module from which heads were removed."""

ATTRIBUTE = "eckart_heads"
"""Attribute of such a module that holds its :class:`PrunedHeads`."""


@dataclass(frozen=True)
class PrunedHeads:
    """Which heads of an attention module are kept, and what has to change in the module.

    Heads that share keys and values (grouped-query attention) count as one head here: they are kept or removed
    together.

    Attributes:
        of: number of heads before.
        kept: heads that are kept, counted from 0.
        rows: layer whose outputs are heads -> rows of one head in each part of its matrix: `(d,)` for one part, `(d, d,
            d)` if all queries are followed by all keys and all values.
        columns: layer whose inputs are heads -> columns of one head.
        numbers: attribute of the module, or of one inside it -> its value with the heads that are kept.
    """

    of: int
    kept: tuple[int, ...]
    rows: Mapping[str, tuple[int, ...]]
    columns: Mapping[str, int]
    numbers: Mapping[str, int]

    def spec(self) -> dict[str, Any]:
        """JSON for a checkpoint's config."""
        return {
            "form": FORM,
            "of": self.of,
            "kept": list(self.kept),
            "rows": {name: list(sizes) for name, sizes in self.rows.items()},
            "columns": dict(self.columns),
            "numbers": dict(self.numbers),
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> PrunedHeads:
        """The inverse of :meth:`spec`.

        Raises:
            UsageError: if an entry is missing or cannot be right.
        """
        try:
            pruned = cls(
                spec["of"],
                tuple(spec["kept"]),
                {name: tuple(sizes) for name, sizes in spec["rows"].items()},
                dict(spec["columns"]),
                dict(spec["numbers"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"heads: {error!r} in {dict(spec)}.") from None
        counts = [pruned.of, *pruned.columns.values(), *(size for sizes in pruned.rows.values() for size in sizes)]
        whole = all(type(number) is int for number in (*counts, *pruned.kept, *pruned.numbers.values()))
        if not whole or min(counts) < 1 or not all((pruned.rows, pruned.columns, *pruned.rows.values())):
            raise UsageError(f"heads: sizes and numbers must be whole, and sizes 1 or more, not {dict(spec)}.")
        if (
            not pruned.kept
            or sorted(set(pruned.kept)) != list(pruned.kept)
            or not 0 <= pruned.kept[0] <= pruned.kept[-1] < pruned.of
        ):
            raise UsageError(f"heads: those kept must be some of 0..{pruned.of - 1} in order, not {list(pruned.kept)}.")
        return pruned

    def apply(self, module: nn.Module) -> None:
        """Remove the other heads from an attention module that has all, in place; on the meta device too.

        Raises:
            UsageError: if the sizes of the module do not fit.
        """
        for name, sizes in self.rows.items():
            layer = _layer(module, name)
            self._check(name, layer.weight.shape[1 if isinstance(layer, Conv1D) else 0], sum(sizes))
            module.set_submodule(name, select_features(layer, self._places(sizes), rows=True))
        for name, size in self.columns.items():
            layer = _layer(module, name)
            self._check(name, layer.weight.shape[0 if isinstance(layer, Conv1D) else 1], size)
            module.set_submodule(name, select_features(layer, self._places((size,)), rows=False))
        self._count(module, self.numbers)
        setattr(module, ATTRIBUTE, self)

    def undo(self, module: nn.Module) -> None:
        """Put zeros in place of removed heads: the module computes the same, and its class can build it."""
        for name, sizes in self.rows.items():
            module.set_submodule(
                name, padded_features(_layer(module, name), self._places(sizes), sum(sizes) * self.of, rows=True)
            )
        for name, size in self.columns.items():
            module.set_submodule(
                name, padded_features(_layer(module, name), self._places((size,)), size * self.of, rows=False)
            )
        self._count(module, {name: number * self.of // len(self.kept) for name, number in self.numbers.items()})
        forget_pruned_heads(module)

    def _check(self, name: str, found: int, of_one: int) -> None:
        if found != of_one * self.of:
            raise UsageError(
                f"heads: {self.of} of {of_one} rows or columns are {of_one * self.of} in {name}, which has {found}."
            )

    def _places(self, sizes: tuple[int, ...]) -> Tensor:
        """Row numbers, in the whole matrix, of the heads that are kept."""
        owners = head_of_each_row(sizes, self.of)
        return torch.isin(owners, torch.tensor(self.kept, device="cpu")).nonzero().flatten()

    @staticmethod
    def _count(module: nn.Module, numbers: Mapping[str, int]) -> None:
        for path, number in numbers.items():
            where, _, attribute = path.rpartition(".")
            try:
                holder = module.get_submodule(where)
            except AttributeError:
                raise UsageError(f"heads: {type(module).__name__} has no module {where}.") from None
            if type(vars(holder).get(attribute)) is not int:
                raise UsageError(f"heads: {type(holder).__name__} has no whole number {attribute}.")
            setattr(holder, attribute, number)


def head_of_each_row(sizes: tuple[int, ...], count: int) -> Tensor:
    """Number of the head that each row belongs to, (sum(sizes) * count,); `sizes` as in :attr:`PrunedHeads.rows`."""
    heads = torch.arange(count, device="cpu")  # also where a model is built on the meta device
    return torch.cat([heads.repeat_interleave(size) for size in sizes])


def pruned_heads(model: nn.Module) -> dict[str, PrunedHeads]:
    """Name -> :class:`PrunedHeads` of every module that has one."""
    return {
        name: found for name, module in model.named_modules() if (found := getattr(module, ATTRIBUTE, None)) is not None
    }


def forget_pruned_heads(module: nn.Module) -> None:
    """Forget the :class:`PrunedHeads` of a module that its class can build without it."""
    module.__dict__.pop(ATTRIBUTE, None)


def select_features(old: Any, places: Tensor, rows: bool) -> nn.Module:
    """A copy of a Linear or Conv1D that keeps some of its outputs or inputs, in their order.

    Args:
        old: the module; it is not changed.
        places: (kept,) int64, numbers of the outputs or inputs.
        rows: True for outputs, False for inputs.
    """
    return _rebuilt(old, lambda tensor, axis: tensor.index_select(axis, places.to(tensor.device)), rows)


def padded_features(old: Any, places: Tensor, width: int, rows: bool) -> nn.Module:
    """A copy of a Linear or Conv1D of full size, with zeros where it had no outputs or inputs.

    Args:
        old: the module; it is not changed.
        places: (kept,) int64, numbers that its outputs or inputs have in full size.
        width: number of outputs or inputs in full size.
        rows: True for outputs, False for inputs.
    """

    def spread(tensor: Tensor, axis: int) -> Tensor:
        shape = [*tensor.shape]
        shape[axis] = width
        return tensor.new_zeros(shape).index_copy(axis, places.to(tensor.device), tensor)

    return _rebuilt(old, spread, rows)


def _rebuilt(old: Any, change: Any, rows: bool) -> nn.Module:
    """A copy of the module with its outputs or inputs changed by `change(tensor, axis)`."""
    new = copy.copy(old)
    new._parameters = dict(old._parameters)
    conv = isinstance(old, Conv1D)
    trains = bool(old.weight.requires_grad)
    weight = change(old.weight.detach(), 0 if rows != conv else 1)
    new.weight = nn.Parameter(weight.contiguous(), requires_grad=trains)
    if old.bias is not None and rows:
        new.bias = nn.Parameter(change(old.bias.detach(), 0), requires_grad=trains)
    if conv:
        new.nx, new.nf = new.weight.shape
    else:
        new.out_features, new.in_features = new.weight.shape
    return new


def _layer(module: nn.Module, name: str) -> Any:
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear | Conv1D):
        raise UsageError(f"heads: {type(module).__name__} has no linear layer {name}.")
    return layer
