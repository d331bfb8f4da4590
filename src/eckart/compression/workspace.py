"""Where a compression computes, where it keeps intermediate results, and which processes share the work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from eckart.distributed import Processes
from eckart.model import ComputePlacement
from eckart.storage.cache import Cache
from eckart.storage.store import EntryStore, MemoryStore


@dataclass
class Workspace:
    """Where to compute and to keep intermediate results; by default all in memory and in one process.

    Attributes:
        compute: device and type that weights are copied to while they compute; None: they stay where they are.
        store: keeps factors and finished modules.
        hidden_states: keeps hidden states between blocks. If it is set, the model is worked on block by block.
        processes: share the text and the sites.
        at_once: number of blocks in a window of statistics, of a model that cannot be run block by block.
        scratch: a folder for weights that have no file and are too large for memory.
    """

    compute: ComputePlacement | None = None
    store: EntryStore = field(default_factory=MemoryStore)
    hidden_states: Cache | None = None
    processes: Processes = field(default_factory=Processes)
    at_once: int = 1
    scratch: Path | None = None

    @property
    def compute_stored(self) -> ComputePlacement | None:
        """The same for the compressed model, which computes in the type that it is stored in."""
        return None if self.compute is None else ComputePlacement(self.compute.device, None)

    def hidden_state_cache(self) -> Cache:
        """The cache of hidden states between blocks; in memory where no other is set."""
        return self.hidden_states if self.hidden_states is not None else Cache(memory=sys.maxsize, folder=None)

    @property
    def streaming(self) -> bool:
        """Whether the model is worked on block by block."""
        return self.hidden_states is not None

    # -- what an interrupted run has done ----------------------------------------------------------------------------

    def finished(self, stage: str) -> list[str]:
        """Names of what a stage has stored, as the first process knows them."""
        names: list[str] = self.processes.broadcast(({}, {"names": self.store.entries(stage)}))[1]["names"]
        return names

    def keep(self, stage: str, name: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Store an entry in every process.

        A process that was killed between two writes may be one entry ahead of the first: it has this one already.
        """
        if self.processes.main or name not in self.store.entries(stage):
            self.store.write(stage, name, tensors, content)

    def remember(self, stage: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Values of JSON, the same in all processes: those that were stored, or else `make()`, which is stored then."""
        stored = self.store.read(stage, stage)[1] if self.store.entries(stage) else {}
        found: dict[str, Any] = self.processes.broadcast(({}, stored))[1]
        if not found:
            found = make()
            if self.processes.main:
                self.store.write(stage, stage, {}, found)
        return found
