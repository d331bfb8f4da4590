"""What a block's modules read or put out, seen in one pass and kept for the passes that follow, as memory holds it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from eckart.moments import BatchLike


class KeptTensors:
    """Tensors by module and batch, where they compute.

    What does not fit is not kept, in files neither: what all modules of a block read is several times as large as what
    it puts out, so writing and reading it takes as long as running that one block again, which needs no disk.

    Args:
        memory: bytes that may be kept.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._kept: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def put(self, name: str, batch: BatchLike, tensor: Tensor) -> None:
        """Keep a tensor, if there is room for it; it must be the only one under its name."""
        if tensor.nbytes <= self.memory:
            self.memory -= tensor.nbytes
            self._kept[name, batch.examples] = tensor

    def get(self, name: str, batch: BatchLike) -> Tensor | None:
        """What is kept; None if nothing is."""
        return self._kept.get((name, batch.examples))

    def take(self, name: str, batch: BatchLike) -> Tensor | None:
        """What is kept, which is kept no longer; None if nothing is."""
        tensor = self._kept.pop((name, batch.examples), None)
        if tensor is not None:
            self.memory += tensor.nbytes
        return tensor


@contextmanager
def replaying(
    model: nn.Module, names: Collection[str], kept: KeptTensors, batch: BatchLike, *, keep: bool = True
) -> Iterator[None]:
    """Modules that would put out what they did in an earlier pass over this batch put that out, and compute nothing.

    A module's first call of a pass is kept and replayed; further ones compute.

    Args:
        model: runs meanwhile.
        names: modules whose weights and inputs are what they will be in all passes that follow.
        kept: keeps outputs.
        batch: what the model reads.
        keep: keep what was not kept before.
    """

    def replacement(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        first = True

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            here, first = first, False
            if not here:
                return own(*args, **kwargs)
            known = kept.get(name, batch)
            if known is not None:
                return known.clone()  # a model may change it in place
            output = own(*args, **kwargs)
            if keep:
                kept.put(name, batch, output.clone())
            return output

        return forward

    modules = {name: model.get_submodule(name) for name in names}
    before = {name: vars(module).get("forward") for name, module in modules.items()}
    for name, module in modules.items():
        vars(module)["forward"] = replacement(name, module.forward)
    try:
        yield
    finally:
        for name, module in modules.items():
            if before[name] is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = before[name]
