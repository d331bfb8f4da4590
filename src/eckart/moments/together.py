"""All sites of a model together: members of a group share the statistics of their input, which count once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from eckart.moments.accumulate import Moments, SecondMoment


def merge(first: dict[str, Moments], second: Mapping[str, Moments]) -> None:
    """Add, in place to `first`, what another run saw of the same model.

    Args:
        first: site -> statistics.
        second: of other text; sites that `first` has not are taken over, not copied.
    """
    merged: set[int] = set()
    matching: dict[int, SecondMoment] = {}  # the inputs of `first` by those of `second`
    for name in (name for name in first if name in second):
        mine, other = first[name].inputs, second[name].inputs
        if id(mine) not in merged:
            mine.merge(other)
            merged.add(id(mine))
        matching[id(other)] = mine
        first[name].merge(second[name])
    for name, entry in second.items():
        if name not in first:
            first[name] = replace(entry, inputs=matching.get(id(entry.inputs), entry.inputs))


def pack(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Statistics as plain tensors, to be summed over processes in place, or saved.

    Returns:
        `<site>:<key of its state>` -> tensor. The sums are the accumulators' own; counts are int64 on the CPU. The
        inputs of a group stand under its first site alone. What was not gathered, or saw nothing, is absent.
    """
    state: dict[str, Tensor] = {}
    named: set[int] = set()
    for name, entry in moments.items():
        shared = id(entry.inputs) in named
        named.add(id(entry.inputs))
        for key, tensor in entry.state().items():
            if not (shared and key.startswith("inputs.")):
                state[f"{name}:{key}"] = tensor
    return state


def unpack(state: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]) -> dict[str, Moments]:
    """What :func:`pack` took apart, on the same tensors.

    Args:
        state: of sites in these groups.
        groups: leader -> members; the members of a group that are in `state` share one `inputs` again.
    """
    sites: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, part = key.rpartition(":")
        sites.setdefault(name, {})[part] = tensor
    moments: dict[str, Moments] = {}
    for members in groups.values():
        inputs: SecondMoment | None = None
        for name in (name for name in members if name in sites):
            moments[name] = Moments.from_state(sites[name], inputs)
            inputs = moments[name].inputs
    return moments
