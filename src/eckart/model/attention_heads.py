"""Attention modules of which some heads are gone: what is left of their matrices, said so that it can be built again.

A model's class builds every attention with the heads that its configuration names. Where the configuration cannot say
how many are left, the module itself carries a :class:`PrunedHeads`, which a checkpoint's config holds for it.
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
"""In place of a form's name: an attention of which some heads are gone."""

MARK = "eckart_heads"
"""Attribute of such a module."""


@dataclass(frozen=True)
class PrunedHeads:
    """Which heads of an attention stay, where their rows and columns are, and which of its numbers follow.

    A head stands here for what goes together: where several heads read the same keys and values, all of them.

    Attributes:
        of: how many there were.
        kept: which stay, counted from 0.
        rows: layer that makes heads -> rows of one head in each stretch of its matrix; `(d,)` where it makes one after
            the other, `(d, d, d)` where it makes all queries, then all keys, then all values.
        columns: layer that reads heads -> columns of one head.
        numbers: attribute of the module, or of one inside it -> what it is with the heads that stay.
    """

    of: int
    kept: tuple[int, ...]
    rows: Mapping[str, tuple[int, ...]]
    columns: Mapping[str, int]
    numbers: Mapping[str, int]

    def spec(self) -> dict[str, Any]:
        """As it stands in a checkpoint's config."""
        return {
            "form": FORM,
            "of": self.of,
            "kept": list(self.kept),
            "rows": {name: list(sizes) for name, sizes in self.rows.items()},
            "columns": dict(self.columns),
            "numbers": dict(self.numbers),
        }

    @classmethod
    def of_spec(cls, spec: Mapping[str, Any]) -> PrunedHeads:
        """What :meth:`spec` gave.

        Raises:
            UsageError: naming what it cannot be.
        """
        try:
            cut = cls(
                spec["of"],
                tuple(spec["kept"]),
                {name: tuple(sizes) for name, sizes in spec["rows"].items()},
                dict(spec["columns"]),
                dict(spec["numbers"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"heads: {error!r} in {dict(spec)}.") from None
        counts = [cut.of, *cut.columns.values(), *(size for sizes in cut.rows.values() for size in sizes)]
        whole = all(type(number) is int for number in (*counts, *cut.kept, *cut.numbers.values()))
        if not whole or min(counts) < 1 or not all((cut.rows, cut.columns, *cut.rows.values())):
            raise UsageError(f"heads: sizes and numbers must be whole, and sizes 1 or more, not {dict(spec)}.")
        if not cut.kept or sorted(set(cut.kept)) != list(cut.kept) or not 0 <= cut.kept[0] <= cut.kept[-1] < cut.of:
            raise UsageError(f"heads: those kept must be some of 0..{cut.of - 1} in order, not {list(cut.kept)}.")
        return cut

    def apply(self, module: nn.Module) -> None:
        """Take the other heads out of an attention that has them all, in place; on the meta device too.

        Raises:
            UsageError: if the module is none that these heads are of.
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
        setattr(module, MARK, self)

    def undo(self, module: nn.Module) -> None:
        """Put zeros where heads are gone, in place: the module computes the same, and its class builds it so."""
        for name, sizes in self.rows.items():
            module.set_submodule(name, _padded(_layer(module, name), self._places(sizes), sum(sizes) * self.of, True))
        for name, size in self.columns.items():
            module.set_submodule(name, _padded(_layer(module, name), self._places((size,)), size * self.of, False))
        self._count(module, {name: number * self.of // len(self.kept) for name, number in self.numbers.items()})
        forget_pruned_heads(module)

    def _check(self, name: str, found: int, of_one: int) -> None:
        if found != of_one * self.of:
            raise UsageError(f"heads: {self.of} of {of_one} are {of_one * self.of} in {name}, which has {found}.")

    def _places(self, sizes: tuple[int, ...]) -> Tensor:
        """Of what stays, in the whole matrix."""
        owners = head_of_each_row(sizes, self.of)
        return torch.isin(owners, torch.tensor(self.kept, device="cpu")).nonzero().flatten()

    @staticmethod
    def _count(module: nn.Module, numbers: Mapping[str, int]) -> None:
        for path, number in numbers.items():
            where, _, attribute = path.rpartition(".")
            try:
                holder = module.get_submodule(where)
            except AttributeError:
                raise UsageError(f"heads: {type(module).__name__} has nothing at {where}.") from None
            if type(vars(holder).get(attribute)) is not int:
                raise UsageError(f"heads: {type(holder).__name__} keeps no whole number {attribute}.")
            setattr(holder, attribute, number)


def head_of_each_row(sizes: tuple[int, ...], count: int) -> Tensor:
    """Which head each row belongs to, (sum(sizes) count,): in every stretch one head after the other."""
    heads = torch.arange(count, device="cpu")  # also where a model is built on the meta device
    return torch.cat([heads.repeat_interleave(size) for size in sizes])


def pruned_heads(model: nn.Module) -> dict[str, PrunedHeads]:
    """Name -> cut of every attention that carries one."""
    return {name: found for name, module in model.named_modules() if (found := getattr(module, MARK, None)) is not None}


def forget_pruned_heads(module: nn.Module) -> None:
    """Take the mark off an attention that its class builds as it is."""
    module.__dict__.pop(MARK, None)


def select_features(old: Any, places: Tensor, rows: bool) -> nn.Module:
    """A Linear or Conv1D with some of its outputs (`rows`) or inputs left, in their order.

    Args:
        old: the module; it stays as it is.
        places: (left,) int64.
        rows: outputs, or else inputs.
    """
    return _rebuilt(old, lambda tensor, axis: tensor.index_select(axis, places.to(tensor.device)), rows)


def _padded(old: Any, places: Tensor, width: int, rows: bool) -> nn.Module:
    def spread(tensor: Tensor, axis: int) -> Tensor:
        shape = [*tensor.shape]
        shape[axis] = width
        return tensor.new_zeros(shape).index_copy(axis, places.to(tensor.device), tensor)

    return _rebuilt(old, spread, rows)


def _rebuilt(old: Any, change: Any, rows: bool) -> nn.Module:
    """The same module with its outputs or inputs changed by `change(tensor, axis)`."""
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
