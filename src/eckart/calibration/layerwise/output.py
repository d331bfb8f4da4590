"""What a block puts out: a tree whose leaves are its own tensors, tensors that it passes on, and constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from eckart.calibration.layerwise.blocks import LayerwiseError

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""Types of leaves that are the same for every batch, or seen to differ."""

Key = tuple[int, int]
"""(step, leaf): a tensor, named by the step that made it and its place in that step's output."""


@dataclass(frozen=True)
class Made:
    """A tensor that the step makes itself."""


@dataclass(frozen=True)
class Passed:
    """A tensor that an earlier step made and this one passes on, such as T5's position bias."""

    key: Key


@dataclass(frozen=True)
class Constant:
    """Anything that is not a tensor."""

    value: Any


@dataclass(frozen=True)
class Structure:
    """How the output of a step is made up; the same for every batch.

    Attributes:
        spec: the tree.
        leaves: what stands at each leaf.
        stream: the leaf that the next step works on: the first floating-point tensor that the step makes.
        shapes: of the leaves, () for what is not a tensor, on the batch that was run first: one example.
    """

    spec: Any
    leaves: tuple[Made | Passed | Constant, ...]
    stream: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def made(self) -> list[int]:
        """Leaves that the step makes itself."""
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Made)]

    def matches(self, other: Structure) -> bool:
        """Whether another batch's output is made up alike, constants included."""
        alike = self.spec == other.spec and self.stream == other.stream
        return alike and all(_alike(a, b) for a, b in zip(self.leaves, other.leaves, strict=True))

    def examples_axis(self, leaf: int, tensor: Tensor, examples: int) -> int | None:
        """The axis of a leaf's tensor that has one entry for each of some examples; None if all share the tensor."""
        sizes = zip(self.shapes[leaf], tensor.shape, strict=False)
        return next((axis for axis, (one, all_) in enumerate(sizes) if one == 1 and all_ == examples), None)


def structure_of(output: Any, known: Mapping[int, Key], where: str) -> Structure:
    """Look at the output of a block.

    Args:
        output: what its forward returned.
        known: id -> key of the tensors that the steps before gave it.
        where: the block's name.

    Raises:
        LayerwiseError: it makes no floating-point tensor.
    """
    flat, spec = pytree.tree_flatten(output)
    leaves: list[Made | Passed | Constant] = []
    for value in flat:
        if not isinstance(value, Tensor):
            if not isinstance(value, PLAIN):  # it might hold tensors, of one batch
                raise LayerwiseError(f"{where} puts out a {type(value).__name__}")
            leaves.append(Constant(value))
        elif id(value) in known:
            leaves.append(Passed(known[id(value)]))
        else:
            leaves.append(Made())
    made = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Made) and flat[i].is_floating_point()]
    if not made:
        raise LayerwiseError(f"{where} puts out no floating-point tensor of its own")
    shapes = tuple(tuple(value.shape) if isinstance(value, Tensor) else () for value in flat)
    return Structure(spec, tuple(leaves), made[0], shapes)


def _alike(one: Made | Passed | Constant, other: Made | Passed | Constant) -> bool:
    if isinstance(one, Constant) and isinstance(other, Constant):
        plain = isinstance(one.value, int | float | str | None)
        return type(one.value) is type(other.value) and (not plain or one.value == other.value)
    return one == other


def flatten(output: Any) -> list[Any]:
    """The leaves of an output."""
    return pytree.tree_leaves(output)


def unflatten(values: list[Any], structure: Structure) -> Any:
    """An output with these leaves."""
    return pytree.tree_unflatten(values, structure.spec)
