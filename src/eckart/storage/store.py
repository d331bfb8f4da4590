"""Where a run keeps what it has made of each window of sites: in memory, or in a journal that survives a kill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class EntryStore(Protocol):
    """Entries of named tensors and plain JSON values, stage by stage, in the order they were written."""

    def entries(self, stage: str) -> list[str]:
        """Names of what is there."""
        ...

    def write(self, stage: str, name: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Keep an entry."""
        ...

    def read(self, stage: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was kept; not to be changed in place."""
        ...

    def drop(self, stage: str) -> None:
        """Forget a stage."""
        ...


class MemoryStore:
    """A store in memory, which shares the tensors that it is given."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, tuple[dict[str, Tensor], dict[str, Any]]]] = {}

    def entries(self, stage: str) -> list[str]:
        """Names of what is there."""
        return list(self._entries.get(stage, ()))

    def write(self, stage: str, name: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Keep an entry."""
        self._entries.setdefault(stage, {})[name] = dict(tensors), dict(content)

    def read(self, stage: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was kept; not to be changed in place."""
        return self._entries[stage][name]

    def drop(self, stage: str) -> None:
        """Forget a stage."""
        self._entries.pop(stage, None)
