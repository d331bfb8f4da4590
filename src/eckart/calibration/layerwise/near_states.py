"""Hidden states that stay on the device that computes, as far as its memory holds them."""

from __future__ import annotations

from torch import Tensor

from eckart.calibration.layerwise.hidden_states import HiddenStateStore


class NearStates:
    """A store in front of another one, for a GPU: what it keeps need not go to the host's memory and come back.

    Args:
        far: keeps what there is no room for.
        memory: bytes that may be kept here.
        everything: `far` keeps everything, as one does whose files are to survive a kill.
    """

    def __init__(self, far: HiddenStateStore, memory: int, *, everything: bool = False) -> None:
        self.far = far
        self.memory = memory
        self.everything = everything
        self._near: dict[str, dict[str, Tensor]] = {}

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep a copy; what the key held before is replaced."""
        self._forget(key)
        size = _nbytes(tensors)
        fits = size <= self.memory
        if fits:
            self._near[key] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self.memory -= size
        if self.everything or not fits:
            self.far.put(key, tensors)
        else:
            self.far.drop(key)

    def get(self, key: str) -> dict[str, Tensor]:
        """Copies, which the caller may change in place."""
        if key in self._near:
            return {name: tensor.clone() for name, tensor in self._near[key].items()}
        return self.far.get(key)

    def has(self, key: str) -> bool:
        """Whether there is something under a key."""
        return key in self._near or self.far.has(key)

    def drop(self, key: str) -> None:
        """Forget a key, if it is there."""
        self._forget(key)
        self.far.drop(key)

    def _forget(self, key: str) -> None:
        self.memory += _nbytes(self._near.pop(key, {}))


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
