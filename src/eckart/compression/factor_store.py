"""Factors of all sites, kept from the moment they are made until they are put in place, and across an interruption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from eckart.calibration import UNREACHED, note_few_tokens
from eckart.compression.curves import Losses
from eckart.compression.solve_joint import JointFactors
from eckart.compression.solve_site import SiteFactors
from eckart.compression.solve_slicing import SlicedLayer, layer_of
from eckart.distributed import Processes
from eckart.errors import ModelError, UsageError
from eckart.forms import Block
from eckart.model.neurons import NeuronLayer
from eckart.storage.store import EntryStore

STAGE = "solved"
"""The stage of a run under which factors are stored."""

JOINT = "joint"
"""What an entry holds of groups of sites that have one input factor."""

SLICED = "sliced"
"""What an entry holds of layers that may lose neurons."""

Serialized = tuple[dict[str, Tensor], dict[str, Any]]
"""Named tensors and JSON values: one entry of a store."""


@dataclass(frozen=True)
class FactorSummary:
    """What every process knows of all sites; small, where the factors themselves are not.

    Attributes:
        losses: factored site -> predicted loss (or error) at every rank, or None where nothing is chosen by it.
        joint: sites that were factored on one input factor -> their predicted loss together at every rank, or None.
        sliced: layers whose neurons were put in order -> predicted loss with 0, 1, ... of them, or None.
        dense: sites that stay dense -> why.
        seen: site -> (tokens, features), of every site that was factored from statistics.
        effective_ranks: of every factored site.
        notes: fallbacks taken.
    """

    losses: dict[str, Losses | None]
    joint: dict[tuple[str, ...], Tensor | None]
    sliced: dict[NeuronLayer, Tensor | None]
    dense: dict[str, str]
    seen: dict[str, tuple[int, int]]
    effective_ranks: dict[str, float]
    notes: list[str]

    def all_notes(self) -> list[str]:
        """Notes for the report: sites that saw few tokens, and fallbacks."""
        return [*note_few_tokens(self.seen), *self.notes]


class FactorStore:
    """Factors of sites, by the name of the site; one entry of the store holds those of one window.

    Args:
        store: keeps them. That of other processes than the first one stays empty.
        processes: share the sites.
        device: where factors are made.
    """

    def __init__(self, store: EntryStore, processes: Processes, device: torch.device) -> None:
        self.store = store
        self.processes = processes
        self.device = device
        self._entry_of: dict[str, str] = {}

    def finished_windows(self) -> list[str]:
        """Windows whose factors are stored, as the first process knows."""
        found: list[str] = self.processes.broadcast(({}, {"done": self.store.entries(STAGE)}))[1]["done"]
        return found

    def add_window(self, name: str, mine: Serialized) -> None:
        """Collect at the first process what all processes made of a window, and store it there."""
        tensors, content = mine
        for other in range(1, self.processes.size):
            sent = self.processes.send(mine, source=other, to=0)
            if sent is not None:
                tensors |= sent[0]
                for key, entries in sent[1].items():
                    content[key] |= entries
        if self.processes.main:
            self.store.write(STAGE, name, tensors, content)

    def entries(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and JSON values of every entry, at the first process."""
        return [(name, self.store.read(STAGE, name)[1]) for name in self.store.entries(STAGE)]

    def __getitem__(self, site: str) -> SiteFactors:
        """The factors of a site; on the first process only."""
        if site not in self._entry_of:
            for name, content in self.entries():
                self._entry_of |= dict.fromkeys(content["sites"], name)
        tensors, content = self.store.read(STAGE, self._entry_of[site])
        return SiteFactors.deserialize(tensors_of(tensors, site), content["sites"][site])

    def joint(self, holder: str) -> JointFactors:
        """The factors of the group whose input factor a site holds; on the first process only."""
        for name, content in self.entries():
            if holder in content[JOINT]:
                tensors = self.store.read(STAGE, name)[0]
                return JointFactors.deserialize(tensors_of(tensors, f"{JOINT}/{holder}"), content[JOINT][holder])
        raise UsageError(
            f"site {holder}: it and the sites that name it as their basis have no common input factor, because they "
            "do not read one tensor inside one block, or no data reaches them. Give them another form in the plan."
        )

    def sliced(self, reader: str) -> SlicedLayer:
        """The slicing of the layer whose neurons a site reads; on the first process only."""
        for name, content in self.entries():
            if reader in content[SLICED]:
                tensors = self.store.read(STAGE, name)[0]
                return SlicedLayer.deserialize(tensors_of(tensors, f"{SLICED}/{reader}"), content[SLICED][reader])
        raise KeyError(reader)

    @cached_property
    def summary(self) -> FactorSummary:
        """What every process may know, read from the entries, also from those of an earlier run."""
        losses: dict[str, Tensor] = {}
        found: dict[str, Any] = {
            "blocks": {},
            "dense": {},
            "seen": {},
            "effective": {},
            "notes": [],
            JOINT: [],
            SLICED: [],
        }
        for name in self.store.entries(STAGE):
            tensors, content = self.store.read(STAGE, name)
            found["dense"] |= content["dense"]
            found["seen"] |= content["seen"]
            for site, own in content["sites"].items():
                factors = SiteFactors.deserialize(tensors_of(tensors, site), own)
                curves = factors.losses or {}
                found["blocks"][site] = [None if block is None else list(block) for block in curves]
                if factors.effective_rank is not None:
                    found["effective"][site] = factors.effective_rank
                found["notes"] += factors.notes
                for place, curve in enumerate(curves.values()):
                    losses[f"{site}/{place}"] = curve.clone()
            for holder, own in content[JOINT].items():
                group = JointFactors.deserialize(tensors_of(tensors, f"{JOINT}/{holder}"), own)
                found[JOINT].append(own["members"])
                found["notes"] += group.notes
                if group.losses is not None:
                    losses[f"{JOINT}/{holder}"] = group.losses.clone()
            for reader, own in content[SLICED].items():
                found[SLICED].append(own["layer"])
                found["notes"] += own["notes"]
                key = f"{SLICED}/{reader}"
                if f"{key}/losses" in tensors:
                    losses[key] = tensors[f"{key}/losses"].clone()
        losses, found = self.processes.broadcast((losses, found))
        return FactorSummary(
            {
                site: {_as_block(block): losses[f"{site}/{i}"] for i, block in enumerate(blocks)} or None
                for site, blocks in found["blocks"].items()
            },
            {tuple(members): losses.get(f"{JOINT}/{members[0]}") for members in found[JOINT]},
            {layer_of(own): losses.get(f"{SLICED}/{own['reader']}") for own in found[SLICED]},
            found["dense"],
            {site: (int(count), int(width)) for site, (count, width) in found["seen"].items()},
            found["effective"],
            found["notes"],
        )

    def require_any(self) -> None:
        """Refuse to go on without a single factored site.

        Raises:
            ModelError: with the reason that most of the chosen sites have.
        """
        if not self.summary.losses:
            raise ModelError(describe_none_factored(self.summary.dense))


def describe_none_factored(dense: Mapping[str, str]) -> str:
    """The message where no site could be factored: why, of most of them, and what helps against that."""
    reasons = Counter(dense.values()).most_common(1)
    if not reasons or reasons[0][0] == UNREACHED:
        return (
            "the calibration data reached none of the chosen sites; use text that runs through them, "
            "or a method that needs no data: --method svd."
        )
    reason, count = reasons[0]
    return (
        f"none of the {len(dense)} chosen sites can be factored: {reason} ({count} of them). Use a method that "
        "measures no gradients, such as --method drone, or one that needs no data: --method svd."
    )


def tensors_of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors that an entry holds for one site, without the site's name."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def _as_block(listed: Sequence[int] | None) -> Block | None:
    return None if listed is None else (listed[0], listed[1])
