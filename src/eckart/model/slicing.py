"""Linear layers with fewer neurons than the model's class builds: ordinary modules, and a note of what they were.

A layer that has lost neurons is a Linear or Conv1D like any other, only smaller, and its tensors have their ordinary
names. The class of a model builds it in full size, so each has a :class:`SlicedFeatures`, which is saved in the
checkpoint's config; where the model's own configuration says the new size, none is needed.
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
from eckart.forms.sliced import Sliced
from eckart.model.attention_heads import head_of_each_row, padded_features, select_features

FORM = Sliced.form

ATTRIBUTE = "eckart_sliced"
"""Attribute of such a layer that holds its :class:`SlicedFeatures`."""


@dataclass(frozen=True)
class SlicedFeatures:
    """How many neurons a layer has, and had.

    Attributes:
        of: before.
        kept: now.
        rows: of a layer that makes the neurons, the rows of one in each part of its matrix: `(1,)` for one part, `(1,
            1)` if all gates are followed by all others, `(2,)` if they take turns. Empty for the layer that reads them.
    """

    of: int
    kept: int
    rows: tuple[int, ...] = ()

    def spec(self) -> dict[str, Any]:
        """JSON for a checkpoint's config."""
        return {"form": FORM, "of": self.of, "kept": self.kept, "rows": list(self.rows)}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> SlicedFeatures:
        """The inverse of :meth:`spec`.

        Raises:
            UsageError: if an entry is missing or cannot be right.
        """
        try:
            found = cls(spec["of"], spec["kept"], tuple(spec["rows"]))
        except (KeyError, TypeError) as error:
            raise UsageError(f"sliced: {error!r} in {dict(spec)}.") from None
        whole = all(type(number) is int and number > 0 for number in (found.of, found.kept, *found.rows))
        if not whole or found.kept > found.of:
            raise UsageError(f"sliced: sizes must be whole, and no more kept than there were, not {dict(spec)}.")
        return found

    def mark(self, module: nn.Module) -> nn.Module:
        """Note on a layer that it was sliced so; returns it."""
        setattr(module, ATTRIBUTE, self)
        return module

    def apply(self, module: nn.Module) -> nn.Module:
        """The layer in its new size, from one of full size whose numbers do not matter; on the meta device too.

        Raises:
            UsageError: if the layer is none, or its size does not fit.
        """
        if not isinstance(module, nn.Linear | Conv1D):
            raise UsageError(f"sliced: {type(module).__name__} is not a linear layer.")
        outputs, inputs = module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
        expected = self.of * sum(self.rows) if self.rows else self.of
        if expected != (outputs if self.rows else inputs):
            side = "rows" if self.rows else "columns"
            raise UsageError(f"sliced: {expected} {side} were there, but the layer is {outputs} x {inputs}.")
        return self.mark(select_features(module, self._places(), rows=bool(self.rows)))

    def undo(self, module: nn.Module) -> nn.Module:
        """A layer of full size, in which zeros are in place of what was taken away."""
        width = self.of * (sum(self.rows) or 1)
        new = padded_features(module, self._places(), width, rows=bool(self.rows))
        vars(new).pop(ATTRIBUTE, None)
        return new

    def filled(self, old: nn.Module, tensors: Mapping[str, Tensor], *, trains: bool) -> nn.Module:
        """A layer of the kind of `old` that holds these tensors, which are shared.

        Args:
            old: of any size.
            tensors: `weight`, in the layer's own orientation, and `bias` where it has one.
            trains: whether gradients are wanted.
        """
        new: Any = copy.copy(old)
        new._parameters = dict(old._parameters)
        for key, tensor in tensors.items():
            new._parameters[key] = nn.Parameter(tensor, requires_grad=trains)
        if isinstance(old, Conv1D):
            new.nx, new.nf = new.weight.shape
        else:
            new.out_features, new.in_features = new.weight.shape
        return self.mark(new)

    def _places(self) -> Tensor:
        """Numbers of the rows or columns, in full size, that the first neurons have."""
        if not self.rows:
            return torch.arange(self.kept, device="cpu")
        return (head_of_each_row(self.rows, self.of) < self.kept).nonzero().flatten()


def sliced_features(model: nn.Module) -> dict[str, SlicedFeatures]:
    """Name -> :class:`SlicedFeatures` of every layer that has one."""
    return {
        name: found for name, module in model.named_modules() if (found := getattr(module, ATTRIBUTE, None)) is not None
    }


def keep_slicing(old: nn.Module, new: nn.Module) -> nn.Module:
    """Note on a layer that takes the place of another one what is noted there; returns it."""
    found: SlicedFeatures | None = getattr(old, ATTRIBUTE, None)
    return new if found is None else found.mark(new)


def forget_slicing(model: nn.Module) -> None:
    """Forget all :class:`SlicedFeatures` of a model whose configuration says its sizes."""
    for module in model.modules():
        vars(module).pop(ATTRIBUTE, None)
