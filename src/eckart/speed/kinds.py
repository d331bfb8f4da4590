"""The kind of work that each module of a model does, found by watching one forward pass.

No name of an architecture is read. Attention is where two tensors that are both computed from the input are multiplied
and a softmax is taken, or where torch's own attention is called. Its projections are the other matrices in the same
part of the block; the matrices in the other parts are the feed-forward layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eckart.forms import Factored, FactoredEmbedding
from eckart.speed.clock import Run
from eckart.speed.module_times import observed_modules

SCORES = "attention scores"
PROJECTIONS = "attention projections"
FEED_FORWARD = "feed-forward"
IN_BLOCKS = "matrices in blocks"
ELEMENTWISE = "activations and sums"
NORMS = "norms"
EMBEDDINGS = "embeddings"
HEADS = "heads"
OTHER = "other"
KINDS = (FEED_FORWARD, PROJECTIONS, SCORES, IN_BLOCKS, ELEMENTWISE, NORMS, EMBEDDINGS, HEADS, OTHER)
"""In the order of tables. `matrices in blocks` are those of a model in which no attention was seen."""

ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention")
PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")
SOFTMAX = "softmax"


def find_kinds(model: nn.Module, run: Run) -> dict[str, str]:
    """Name of each module that a forward pass calls -> the kind of its own work, its children's left out.

    Args:
        model: in evaluation mode.
        run: a forward pass of it.
    """
    watch = _Watch(model)
    with observed_modules(model, watch.enter, watch.leave), watch:
        run()
    attention = watch.attention
    scopes = {_scope(name, model) for name in attention}
    return {
        name: _kind(name, model.get_submodule(name) if name else model, model, attention, scopes)
        for name in watch.called
    }


def add_up(seconds: Mapping[str, float], kinds: Mapping[str, str]) -> dict[str, float]:
    """Seconds by kind, in the order of tables; kinds that take none are left out."""
    sums = dict.fromkeys(KINDS, 0.0)
    for name, value in seconds.items():
        sums[kinds.get(name, OTHER)] += value
    return {kind: value for kind, value in sums.items() if value}


def _kind(name: str, module: nn.Module, model: nn.Module, attention: set[str], scopes: set[str]) -> str:
    if name in attention:
        return SCORES
    if isinstance(module, nn.Embedding | FactoredEmbedding):
        return EMBEDDINGS
    inside = block_part(name, model) is not None
    own = list(module.parameters(recurse=False))
    if isinstance(module, Factored) or any(parameter.dim() in (2, 3) for parameter in own):
        if not inside:
            return HEADS
        if not attention:
            return IN_BLOCKS
        return PROJECTIONS if _within(name, scopes) else FEED_FORWARD
    if own and all(parameter.dim() == 1 for parameter in own):
        return NORMS
    if not inside or own:
        return OTHER
    return SCORES if _within(name, scopes) else ELEMENTWISE


def block_part(name: str, model: nn.Module) -> str | None:
    """The part of a block that holds a module: the child of an item of the innermost list; None outside of lists."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 2])
    return None


def _scope(name: str, model: nn.Module) -> str:
    return block_part(name, model) or name


def _within(name: str, scopes: set[str]) -> bool:
    return any(name == scope or name.startswith(f"{scope}.") for scope in scopes)


class _Watch(TorchFunctionMode):
    """Follows which module is open, and notes those whose own code computes attention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.called: dict[str, None] = {}
        self.attends: set[str] = set()
        self.multiplies: set[str] = set()
        self.normalizes: set[str] = set()
        self._open: list[str] = []
        self._stored = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}

    @property
    def attention(self) -> set[str]:
        return self.attends | (self.multiplies & self.normalizes)

    def enter(self, name: str, module: nn.Module) -> None:
        self.called[name] = None
        self._open.append(name)

    def leave(self, name: str, module: nn.Module) -> None:
        self._open.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        word = getattr(func, "__name__", "")
        if self._open:
            if word in ATTENTION:
                self.attends.add(self._open[-1])
            elif word == SOFTMAX:
                self.normalizes.add(self._open[-1])
            elif word in PRODUCTS and self._both_computed(args):
                self.multiplies.add(self._open[-1])
        return func(*args, **(kwargs or {}))

    def _both_computed(self, args: Any) -> bool:
        tensors = list(_tensors(args))
        return len(tensors) > 1 and not any(_storage(tensor) in self._stored for tensor in tensors)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().data_ptr()
