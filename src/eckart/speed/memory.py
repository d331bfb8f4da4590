"""Peak memory of a forward pass: what a model holds, and what lives at one time while it runs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eckart.speed.clock import Run


def held_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    stored = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(stored.values())


def peak_bytes(model: nn.Module, run: Run, device: torch.device | str = "cpu") -> int:
    """Bytes of the model and, on top, the most that a call holds at one time.

    On a GPU the allocator counts. On a CPU, where it does not, the tensors that are alive are counted; working memory
    inside a kernel is not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return held_bytes(model) + torch.cuda.max_memory_allocated(device) - before
    with _Alive() as alive:
        run()
    return held_bytes(model) + alive.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that were made since it was entered and are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage()._cdata)  # an operation in place makes nothing new
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
