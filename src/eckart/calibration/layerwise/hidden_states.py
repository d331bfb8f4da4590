"""What the blocks of a model put out, kept between two steps of a layerwise run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from eckart.moments import BatchLike

Kind = Literal["outputs", "rest", "gradients"]
KINDS: tuple[Kind, ...] = ("outputs", "rest", "gradients")


class HiddenStateStore(Protocol):
    """Keeps tensors between two steps; what it gives back may be changed in place."""

    def put(self, key: str, tensors: dict[str, Tensor]) -> None: ...

    def get(self, key: str) -> dict[str, Tensor]: ...

    def has(self, key: str) -> bool: ...

    def drop(self, key: str) -> None: ...


class HiddenStates:
    """The hidden states of one model, by step and batch.

    Kinds: the "outputs" of a step (leaf -> tensor); the "rest" of them, once the stream, which only the next step
    reads, has been dropped; the "gradients" for the steps before a step (`step.leaf` -> tensor).

    Args:
        store: keeps the tensors.
        name: keeps models apart that share the store.
    """

    def __init__(self, store: HiddenStateStore, name: str) -> None:
        self.store = store
        self.name = name

    def put(self, kind: Kind, step: int, batch: BatchLike, tensors: dict[str, Tensor]) -> None:
        self.store.put(self._key(kind, step, batch), tensors)

    def get(self, kind: Kind, step: int, batch: BatchLike) -> dict[str, Tensor]:
        return self.store.get(self._key(kind, step, batch))

    def has(self, kind: Kind, step: int, batch: BatchLike) -> bool:
        return self.store.has(self._key(kind, step, batch))

    def drop(self, kind: Kind, step: int, batch: BatchLike) -> None:
        self.store.drop(self._key(kind, step, batch))

    def outputs(self, step: int, batch: BatchLike) -> dict[str, Tensor]:
        """What a step put out on a batch, as far as it has not been dropped: leaf -> tensor."""
        return self.get("outputs" if self.has("outputs", step, batch) else "rest", step, batch)

    def split(
        self,
        whole: BatchLike,
        pieces: Sequence[BatchLike],
        steps: Sequence[int],
        axis_of: Callable[[str, int, Tensor, int], int | None],
    ) -> None:
        """Split the hidden states of a batch between its pieces.

        Args:
            whole: the batch.
            pieces: its rows, in their order.
            steps: whose hidden states there may be.
            axis_of: (name of the tensor, step, tensor, examples) -> the axis of examples; None if all share the tensor.
        """
        examples = len(whole.examples)
        for kind in KINDS:
            for step in steps:
                if not self.has(kind, step, whole):
                    continue
                tensors = self.get(kind, step, whole)
                axes = {name: axis_of(name, step, tensor, examples) for name, tensor in tensors.items()}
                for piece, (start, stop) in zip(pieces, _spans(pieces), strict=True):
                    rows = {name: _rows(t, start, stop, axes[name], kind) for name, t in tensors.items()}
                    self.put(kind, step, piece, rows)
                self.drop(kind, step, whole)

    def _key(self, kind: Kind, step: int, batch: BatchLike) -> str:
        return f"{self.name}/{kind}/{step}/{batch.examples[0]}-{batch.examples[-1]}"


def _spans(pieces: Sequence[BatchLike]) -> Iterator[tuple[int, int]]:
    start = 0
    for piece in pieces:
        yield start, start + len(piece.examples)
        start += len(piece.examples)


def _rows(tensor: Tensor, start: int, stop: int, axis: int | None, kind: Kind) -> Tensor:
    """The rows of a tensor that has one for each example; what all share stays whole, its gradient with the first."""
    if axis is not None:
        return tensor.narrow(axis, start, stop - start)
    return tensor if kind != "gradients" or start == 0 else torch.zeros_like(tensor)
