"""Factors of all sites, window by window: solved by the process that owns a site, kept by the first one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.allocate import Choice
from eckart.calibrate import why_useless
from eckart.forms import Block
from eckart.model import Site, dense_weight
from eckart.moments import Moments, pack, unpack
from eckart.planning import Losses, Settings
from eckart.processes import Processes
from eckart.solving import Solved, solve
from eckart.store import Store
from eckart.walk import Window

STAGE = "solved"
"""The stage of a run, as its store names it."""

Packed = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Summary:
    """What is known of all sites, small enough for every process.

    Attributes:
        losses: solved site -> predicted loss (or error) at every rank, or None where nothing is chosen by it.
        dense: sites that stay dense -> why.
        seen: site -> (tokens, features), of every site that was solved from statistics.
        effective_ranks: of every solved site.
        notes: fallbacks taken.
    """

    losses: dict[str, Losses | None]
    dense: dict[str, str]
    seen: dict[str, tuple[int, int]]
    effective_ranks: dict[str, float]
    notes: list[str]


class Shelf:
    """Solved sites in a store.

    Args:
        store: keeps them; of other processes than the first it stays empty.
        processes: share the sites.
        device: where factors are made.
    """

    def __init__(self, store: Store, processes: Processes, device: torch.device) -> None:
        self.store = store
        self.processes = processes
        self.device = device
        self._where: dict[str, str] = {}

    def fill(
        self,
        windows: Callable[[Collection[str]], Iterator[Window]],
        model: nn.Module,
        sites: Mapping[str, Site],
        settings: Settings,
        limits: Mapping[str, Sequence[Choice]],
        *,
        curve: bool,
        reuse: bool = False,
    ) -> None:
        """Solve all sites of all windows that are not on the shelf yet.

        Args:
            windows: gives those that are not done.
            model: holds the weights.
            sites: by name.
            settings: method, form, allocation.
            limits: site -> largest choices that may be made.
            curve: whether predicted losses are wanted.
            reuse: leave the windows' statistics as they are, for another method.
        """
        done = self._agreed({"done": self.store.entries(STAGE)})["done"]
        for window in windows(done):
            self._add(window, dict(window.moments) if reuse else window.moments, model, sites, settings, limits, curve)

    def _add(
        self,
        window: Window,
        moments: dict[str, Moments],
        model: nn.Module,
        sites: Mapping[str, Site],
        settings: Settings,
        limits: Mapping[str, Sequence[Choice]],
        curve: bool,
    ) -> None:
        """Solve a window's sites; its statistics are freed on the way, its factors when they are stored."""
        owners = self._reduced(window, moments, sites)
        mine: Packed = ({}, {"sites": {}, "dense": {}, "seen": {}})
        with self.processes.together():
            for name in [n for members in window.groups.values() for n in members]:
                entry = moments.pop(name, None)
                if owners.get(name, 0) == self.processes.rank:
                    self._solve(sites[name], entry, model, settings, limits[name], curve, mine)
        self._keep(window.name, mine)

    def summary(self) -> Summary:
        """What all processes may know; read from the entries, those of an earlier run included."""
        losses: dict[str, Tensor] = {}
        found: dict[str, Any] = {"blocks": {}, "dense": {}, "seen": {}, "effective": {}, "notes": []}
        for name in self.store.entries(STAGE):
            tensors, content = self.store.read(STAGE, name)
            found["dense"] |= content["dense"]
            found["seen"] |= content["seen"]
            for site, own in content["sites"].items():
                solved = Solved.unpack(_of(tensors, site), own)
                found["blocks"][site] = [] if solved.losses is None else [_listed(block) for block in solved.losses]
                found["effective"][site] = solved.effective_rank
                found["notes"] += solved.notes
                for place, curve in enumerate((solved.losses or {}).values()):
                    losses[f"{site}/{place}"] = curve.clone()
        losses, found = self.processes.broadcast((losses, found))
        return Summary(
            {
                site: {_block(block): losses[f"{site}/{i}"] for i, block in enumerate(blocks)} or None
                for site, blocks in found["blocks"].items()
            },
            found["dense"],
            {site: (int(count), int(width)) for site, (count, width) in found["seen"].items()},
            found["effective"],
            found["notes"],
        )

    def __getitem__(self, site: str) -> Solved:
        """The factors of a site; on the first process alone."""
        if site not in self._where:
            for name in self.store.entries(STAGE):
                self._where |= dict.fromkeys(self.store.read(STAGE, name)[1]["sites"], name)
        tensors, content = self.store.read(STAGE, self._where[site])
        return Solved.unpack(_of(tensors, site), content["sites"][site])

    def _solve(
        self,
        site: Site,
        moments: Moments | None,
        model: nn.Module,
        settings: Settings,
        limits: Sequence[Choice],
        curve: bool,
        found: Packed,
    ) -> None:
        tensors, content = found
        if settings.method.needs or moments is not None:
            reason = "no token of the calibration data reached it" if moments is None else why_useless(moments)
            if reason is not None:
                content["dense"][site.name] = reason
                return
        if moments is not None:
            content["seen"][site.name] = [moments.inputs.count, moments.inputs.width]
        weight = dense_weight(model.get_submodule(site.name)).to(self.device)
        solved = solve(site, weight, moments, settings, limits, curve=curve)
        packed, own = solved.pack()
        content["sites"][site.name] = own
        tensors |= {f"{site.name}/{key}": value for key, value in packed.items()}

    def _reduced(self, window: Window, moments: dict[str, Moments], sites: Mapping[str, Site]) -> dict[str, int]:
        """Sum the statistics of a window over all processes, each group's at the process that will solve it."""
        if self.processes.size == 1:
            return {}
        costs = {leader: sum(_cost(sites[name]) for name in members) for leader, members in window.groups.items()}
        owners = self.processes.assign(costs)
        for owner in range(self.processes.size):
            groups = {leader: m for leader, m in window.groups.items() if owners[leader] == owner}
            names = [name for members in groups.values() for name in members]
            # A process whose text never reached a site, such as an expert, has nothing to add.
            sums = pack({name: moments.pop(name) for name in names if name in moments})
            self.processes.reduce(sums, owner)
            if owner == self.processes.rank:
                moments |= unpack(sums, groups)
        return {name: owners[leader] for leader, members in window.groups.items() for name in members}

    def _keep(self, name: str, mine: Packed) -> None:
        """Bring what the processes made of a window to the first one, and store it there."""
        tensors, content = mine
        for other in range(1, self.processes.size):
            sent = self.processes.send(mine, source=other, to=0)
            if sent is not None:
                tensors |= sent[0]
                for key, entries in sent[1].items():
                    content[key] |= entries
        if self.processes.main:
            self.store.write(STAGE, name, tensors, content)

    def _agreed(self, value: dict[str, Any]) -> dict[str, Any]:
        return self.processes.broadcast(({}, value))[1]


def _of(tensors: Mapping[str, Tensor], site: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{site}/"): value for key, value in tensors.items() if key.startswith(f"{site}/")}


def _listed(block: Block | None) -> list[int] | None:
    return None if block is None else list(block)


def _block(listed: Sequence[int] | None) -> Block | None:
    return None if listed is None else (listed[0], listed[1])


def _cost(site: Site) -> float:
    """Of factoring: a decomposition of the smaller side, and products with the larger."""
    small, large = sorted(site.shape)
    return float(small) ** 3 * 10 + float(small) ** 2 * large
