"""Where a run computes, where it keeps what it has made, and with whom it shares the work."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from eckart.distributed import Processes
from eckart.model import ComputePlacement
from eckart.storage.cache import Cache
from eckart.storage.store import EntryStore, MemoryStore


@dataclass
class Workspace:
    """Everything in memory and in one process, unless told otherwise: small models need no more.

    Attributes:
        compute: device and type that weights are brought to while they compute; None: they are there.
        store: keeps factors and modules.
        waiting: keeps hidden states between blocks. Given one, the model is walked block by block.
        processes: share the text and the sites.
        at_once: blocks that make a window of statistics where a model cannot be walked.
        scratch: a folder for numbers that have no file and are too many for memory.
    """

    compute: ComputePlacement | None = None
    store: EntryStore = field(default_factory=MemoryStore)
    waiting: Cache | None = None
    processes: Processes = field(default_factory=Processes)
    at_once: int = 1
    scratch: Path | None = None

    @property
    def compute_stored(self) -> ComputePlacement | None:
        """Where a compressed model computes: on the same device, in the type that it is stored in."""
        return None if self.compute is None else ComputePlacement(self.compute.device, None)

    def hidden_state_cache(self) -> Cache:
        """Where hidden states wait; in memory, if there is no other place."""
        return self.waiting if self.waiting is not None else Cache(memory=sys.maxsize, folder=None)

    @property
    def streaming(self) -> bool:
        """Whether the model is larger than what may be held at a time."""
        return self.waiting is not None
