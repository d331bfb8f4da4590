"""Which weights may have one input factor: those of a block that read one and the same tensor.

Queries, keys and values; gate and up; keys and values of a cross-attention: whatever the model shows when it runs.
Weights of several blocks that read one tensor, such as the output of an encoder, make a group in each block: blocks are
worked on one after another, and a factor for all of them would have to hold what every layer reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from eckart.calibration.layerwise import block_of
from eckart.model import Site

JointGroups = Sequence[tuple[str, ...]]
"""Groups of two sites or more that may have one input factor."""


def joint_groups(groups: Mapping[str, Sequence[str]], model: nn.Module) -> JointGroups:
    """Groups of two sites or more.

    Args:
        groups: leader -> sites that read one tensor.
        model: holds them.
    """
    found: dict[tuple[str, str | None], list[str]] = {}
    for leader, members in groups.items():
        for name in members:
            found.setdefault((leader, block_of(name, model)), []).append(name)
    return [tuple(members) for members in found.values() if len(members) > 1]


def possible_groups(sites: Sequence[Site], model: nn.Module) -> JointGroups:
    """Groups that there may be, before the model has run: sites of a block that have one width."""
    found: dict[tuple[str | None, int], list[str]] = {}
    for site in sites:
        found.setdefault((block_of(site.name, model), site.in_features), []).append(site.name)
    return [tuple(members) for members in found.values() if len(members) > 1]
