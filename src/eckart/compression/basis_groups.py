"""Which weights share a basis: those of one role in adjacent layers that read what a normalization put out.

The paper (Basis Sharing, arXiv 2410.03765) shares among queries, keys, values, up and gate, and not among what writes
back to the residual stream, whose inputs differ too much from layer to layer. The first read a normalized input, which
keeps its scale and its directions from one layer to the next; outputs of attention and of activations do not. That is
seen by running the model, so that no name of a projection is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from eckart.allocation import Bases
from eckart.calibration.layerwise import all_blocks, block_of
from eckart.model import Site
from eckart.moments import reading_norms

LAYERS_PER_BASIS = 2
"""Adjacent layers that share, as published."""


def adjacent(
    sites: Sequence[Site], model: nn.Module, layers_per_basis: int | None = None, among: Collection[str] | None = None
) -> Bases:
    """Groups of sites of one role and shape in adjacent blocks of a list, `layers_per_basis` blocks each.

    Args:
        sites: in the order of the model.
        model: holds them.
        layers_per_basis: so many blocks; None for :data:`LAYERS_PER_BASIS`.
        among: only these sites; None for all.

    Returns:
        Groups of two or more, each in order; a site that is in none stays alone.
    """
    size = layers_per_basis or LAYERS_PER_BASIS
    groups: dict[tuple[Any, ...], list[str]] = {}
    for site in sites:
        block = block_of(site.name, model)
        if block is None or (among is not None and site.name not in among):
            continue
        parent, _, number = block.rpartition(".")
        role = site.name.removeprefix(block)
        key = (parent, int(number) // size, role, site.shape, site.source)
        groups.setdefault(key, []).append(site.name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def reading_a_norm(sites: Sequence[Site], model: nn.Module, run: Callable[[], Any]) -> frozenset[str]:
    """The sites that are called on what a normalization put out, seen in one small forward pass."""
    return reading_norms(model, [site.name for site in sites], run, all_blocks(model))
