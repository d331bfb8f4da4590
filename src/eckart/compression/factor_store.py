"""Factors of all sites, window by window: solved by the process that owns a site, kept by the first one.

Sites that share a basis wait for each other, in the store, and are solved by the first process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.allocation import Bases, Choice
from eckart.calibration import why_useless
from eckart.calibration.layerwise import StatisticsWindow
from eckart.compression.factorize import SiteFactors, solve, solve_together
from eckart.compression.plan_builder import Losses
from eckart.compression.settings import Settings
from eckart.distributed import Processes
from eckart.forms import Block
from eckart.model import Site, dense_weight
from eckart.moments import Moments, deserialize, serialize
from eckart.storage.store import EntryStore

STAGE = "solved"
"""The stage of a run, as its store names it."""

REST = "bases of which not all sites were reached"
"""The entry of groups that were still waiting when all windows were done."""

WAITING = "waiting"

Packed = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class FactorSummary:
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


class FactorStore:
    """Solved sites in a store.

    Args:
        store: keeps them; of other processes than the first it stays empty.
        processes: share the sites.
        device: where factors are made.
    """

    def __init__(self, store: EntryStore, processes: Processes, device: torch.device) -> None:
        self.store = store
        self.processes = processes
        self.device = device
        self._where: dict[str, str] = {}

    def fill(
        self,
        windows: Callable[[Collection[str]], Iterator[StatisticsWindow]],
        model: nn.Module,
        sites: Mapping[str, Site],
        settings: Settings,
        limits: Mapping[str, Sequence[Choice]],
        *,
        curve: bool,
        bases: Bases = (),
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
            bases: sites that share a basis.
            reuse: leave the windows' statistics as they are, for another method.
        """
        done = self._agreed({"done": self.store.entries(STAGE)})["done"]
        work = FactorizationContext(
            model, sites, settings, limits, curve, {name: group for group in bases for name in group}
        )
        for window in windows(done):
            self._add(window, dict(window.moments) if reuse else window.moments, work)
        if bases and REST not in done:
            self._rest(work, bases)

    def _add(self, window: StatisticsWindow, moments: dict[str, Moments], work: FactorizationContext) -> None:
        """Solve a window's sites; its statistics are freed on the way, its factors when they are stored."""
        owners = self._reduced(window, moments, work)
        mine: Packed = ({}, {"sites": {}, "dense": {}, "seen": {}})
        here: dict[str, Moments | None] = {}
        with self.processes.failing_together():
            for name in [n for members in window.groups.values() for n in members]:
                entry = moments.pop(name, None)
                if owners.get(name, 0) != self.processes.rank:
                    continue
                if name in work.mates:
                    here[name] = entry
                else:
                    self._solve(name, entry, work, mine)
            if here:
                self._solve_bases(here, window.groups, work, mine)
        self._keep(window.name, mine)

    def _solve_bases(
        self,
        here: dict[str, Moments | None],
        inputs: Mapping[str, Sequence[str]],
        work: FactorizationContext,
        found: Packed,
    ) -> None:
        """Solve the groups that are complete now; what still waits for others is put with what is found."""
        before = self._waiting()
        for group in dict.fromkeys(work.mates[name] for name in here):
            if all(name in here or name in before for name in group):
                known = {name: here.pop(name) if name in here else self._waited(name, before[name]) for name in group}
                self._solve_together(known, work, found)
        tensors, content = found
        content[WAITING] = list(here)
        content["inputs"] = {leader: list(members) for leader, members in inputs.items()}
        state = serialize({name: entry for name, entry in here.items() if entry is not None})
        tensors |= {f"{WAITING}/{key}": value for key, value in state.items()}

    def _rest(self, work: FactorizationContext, bases: Bases) -> None:
        """Solve groups some of whose sites no window has brought, without those."""
        mine: Packed = ({}, {"sites": {}, "dense": {}, "seen": {}})
        with self.processes.failing_together():
            if self.processes.main:
                before = self._waiting()
                contents = [self.store.read(STAGE, entry)[1] for entry in self.store.entries(STAGE)]
                done = {name for content in contents for name in (*content["sites"], *content["dense"])}
                for group in bases:
                    left = [name for name in group if name in before and name not in done]
                    self._solve_together({name: self._waited(name, before[name]) for name in left}, work, mine)
        self._keep(REST, mine)

    def _waiting(self) -> dict[str, str]:
        """Site -> the entry in which its statistics wait."""
        entries = self.store.entries(STAGE)
        return {name: entry for entry in entries for name in self.store.read(STAGE, entry)[1].get(WAITING, ())}

    def _waited(self, name: str, entry: str) -> Moments | None:
        tensors, content = self.store.read(STAGE, entry)
        return deserialize(_of(tensors, WAITING), content["inputs"]).get(name)

    def summary(self) -> FactorSummary:
        """What all processes may know; read from the entries, those of an earlier run included."""
        losses: dict[str, Tensor] = {}
        found: dict[str, Any] = {"blocks": {}, "dense": {}, "seen": {}, "effective": {}, "notes": []}
        for name in self.store.entries(STAGE):
            tensors, content = self.store.read(STAGE, name)
            found["dense"] |= content["dense"]
            found["seen"] |= content["seen"]
            for site, own in content["sites"].items():
                solved = SiteFactors.unpack(_of(tensors, site), own)
                found["blocks"][site] = [] if solved.losses is None else [_listed(block) for block in solved.losses]
                found["effective"][site] = solved.effective_rank
                found["notes"] += solved.notes
                for place, curve in enumerate((solved.losses or {}).values()):
                    losses[f"{site}/{place}"] = curve.clone()
        losses, found = self.processes.broadcast((losses, found))
        return FactorSummary(
            {
                site: {_block(block): losses[f"{site}/{i}"] for i, block in enumerate(blocks)} or None
                for site, blocks in found["blocks"].items()
            },
            found["dense"],
            {site: (int(count), int(width)) for site, (count, width) in found["seen"].items()},
            found["effective"],
            found["notes"],
        )

    def __getitem__(self, site: str) -> SiteFactors:
        """The factors of a site; on the first process alone."""
        if site not in self._where:
            for name in self.store.entries(STAGE):
                self._where |= dict.fromkeys(self.store.read(STAGE, name)[1]["sites"], name)
        tensors, content = self.store.read(STAGE, self._where[site])
        return SiteFactors.unpack(_of(tensors, site), content["sites"][site])

    def _solve(self, name: str, moments: Moments | None, work: FactorizationContext, found: Packed) -> None:
        if self._useful(name, moments, work, found[1]):
            weight = self._weight(name, work)
            settings, limits = work.settings, work.limits[name]
            _put(found, name, solve(work.sites[name], weight, moments, settings, limits, curve=work.curve))

    def _solve_together(self, known: Mapping[str, Moments | None], work: FactorizationContext, found: Packed) -> None:
        """Solve the sites of a group that data reached; one that is left alone has a basis of its own."""
        useful = {name: entry for name, entry in known.items() if self._useful(name, entry, work, found[1])}
        if not useful:
            return
        weights = [self._weight(name, work) for name in useful]
        moments = [entry for entry in useful.values() if entry is not None]
        largest = max((choice for name in useful for choice in work.limits[name]), key=lambda choice: choice.rank)
        for name, solved in solve_together(list(useful), weights, moments, work.settings, largest).items():
            _put(found, name, solved)

    def _useful(self, name: str, moments: Moments | None, work: FactorizationContext, content: dict[str, Any]) -> bool:
        """Whether a site's statistics say something; notes why not, or how many tokens it saw."""
        if work.settings.method.needs or moments is not None:
            reason = "no token of the calibration data reached it" if moments is None else why_useless(moments)
            if reason is not None:
                content["dense"][name] = reason
                return False
        if moments is not None:
            content["seen"][name] = [moments.tokens, work.sites[name].in_features]
        return True

    def _weight(self, name: str, work: FactorizationContext) -> Tensor:
        return dense_weight(work.model.get_submodule(name)).to(self.device)

    def _reduced(
        self, window: StatisticsWindow, moments: dict[str, Moments], work: FactorizationContext
    ) -> dict[str, int]:
        """Sum the statistics of a window over all processes, each group's at the process that will solve it."""
        if self.processes.size == 1:
            return {}
        costs = {leader: sum(_cost(work.sites[name]) for name in m) for leader, m in window.groups.items()}
        owners = self.processes.assign_owners(costs)
        # Only the first process has a store, in which others of the group may wait.
        owners |= {leader: 0 for leader, members in window.groups.items() if any(n in work.mates for n in members)}
        for owner in range(self.processes.size):
            groups = {leader: m for leader, m in window.groups.items() if owners[leader] == owner}
            names = [name for members in groups.values() for name in members]
            # A process whose text never reached a site, such as an expert, has nothing to add.
            sums = serialize({name: moments.pop(name) for name in names if name in moments})
            self.processes.reduce(sums, owner)
            if owner == self.processes.rank:
                moments |= deserialize(sums, groups)
        return {name: owners[leader] for leader, members in window.groups.items() for name in members}

    def _keep(self, name: str, mine: Packed) -> None:
        """Bring what the processes made of a window to the first one, and store it there."""
        tensors, content = mine
        for other in range(1, self.processes.size):
            sent = self.processes.send(mine, source=other, to=0)
            if sent is not None:
                tensors |= sent[0]
                for key, entries in sent[1].items():  # nothing waits at another process than the first
                    content[key] |= entries
        if self.processes.main:
            self.store.write(STAGE, name, tensors, content)

    def _agreed(self, value: dict[str, Any]) -> dict[str, Any]:
        return self.processes.broadcast(({}, value))[1]


@dataclass(frozen=True)
class FactorizationContext:
    """What all windows of a run are solved with (:meth:`FactorStore.fill`). `mates`: site -> the group of its basis."""

    model: nn.Module
    sites: Mapping[str, Site]
    settings: Settings
    limits: Mapping[str, Sequence[Choice]]
    curve: bool
    mates: Mapping[str, Sequence[str]]


def _put(found: Packed, name: str, solved: SiteFactors) -> None:
    tensors, content = found
    packed, content["sites"][name] = solved.pack()
    tensors |= {f"{name}/{key}": value for key, value in packed.items()}


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
