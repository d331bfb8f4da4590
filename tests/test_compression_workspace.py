"""What a run keeps, and what another run of the same command finds of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from eckart.compression.workspace import Workspace
from eckart.distributed import Processes


@dataclass(frozen=True)
class Second(Processes):
    """The second of two processes; `sent` is what the first one sends."""

    rank: int = 1
    size: int = 2
    sent: dict[str, object] = field(default_factory=dict)

    def broadcast(self, value, source=0):
        return {}, self.sent


def test_what_was_found_is_not_looked_for_again():
    place, made = Workspace(), []

    def make():
        made.append(1)
        return {"found": 7}

    assert place.remember("plan", make) == {"found": 7}
    assert place.remember("plan", make) == {"found": 7}
    assert made == [1]
    assert place.finished("plan") == ["plan"]
    assert place.finished("other") == []


def test_a_process_that_is_one_entry_ahead_keeps_the_one_it_has():
    place = Workspace(processes=Second(sent={"names": ["0"]}))
    assert place.finished("refitted") == ["0"], "as the first process knows"
    place.keep("refitted", "1", {"w": torch.ones(2)}, {"of": "the killed run"})
    place.keep("refitted", "1", {"w": torch.zeros(2)}, {"of": "this run"})
    assert place.store.read("refitted", "1")[1] == {"of": "the killed run"}


def test_another_process_takes_what_the_first_one_found():
    place = Workspace(processes=Second(sent={"found": 7}))
    assert place.remember("plan", lambda: {"found": 8}) == {"found": 7}
    assert place.store.entries("plan") == []
