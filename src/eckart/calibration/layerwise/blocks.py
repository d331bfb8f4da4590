"""The blocks of a model, and in which order a forward pass calls them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


class LayerwiseError(Exception):
    """A model cannot be run block by block; the text says why. It is caught: whole passes take its place."""


def block_of(name: str, model: nn.Module) -> str | None:
    """The item of the outermost ModuleList that holds a module; None if there is no such list."""
    for match in re.finditer(r"\.(\d+)(?=\.|$)", name):
        if isinstance(model.get_submodule(name[: match.start()]), nn.ModuleList):
            return name[: match.end()]
    return None


def blocks_of(names: Sequence[str], model: nn.Module) -> list[str]:
    """All items of the outermost ModuleLists that hold the named modules, list by list."""
    parents = {block.rpartition(".")[0]: None for name in names if (block := block_of(name, model)) is not None}
    lists: dict[str, Any] = {parent: model.get_submodule(parent) for parent in parents}
    return [f"{parent}.{i}" for parent, blocks in lists.items() for i in range(len(blocks))]


def all_blocks(model: nn.Module) -> list[str]:
    """Every item of an outermost ModuleList that is called as a whole: what is brought in while it runs."""
    blocks = blocks_of([name for name, _ in model.named_modules()], model)
    return [b for b in blocks if not isinstance(model.get_submodule(b), nn.ModuleList | nn.ModuleDict)]


@dataclass(frozen=True)
class BlockSchedule:
    """A forward pass as a chain of steps, each the call of a block, and of segments.

    Segment t is step t with what the model computes by itself before it; the last one, the tail, comes after all steps.

    Attributes:
        steps: the block that each step calls; a block that is shared between layers stands several times.
        segments: module -> the segments in which it is called.
        between: modules that are called outside the blocks.
    """

    steps: tuple[str, ...]
    segments: dict[str, tuple[int, ...]]
    between: frozenset[str]

    @property
    def tail(self) -> int:
        """Number of the segment after all steps."""
        return len(self.steps)

    def ends_run(self, step: int) -> bool:
        """Whether a step is the last before another ModuleList's, so that more than the next step may read it."""
        here = self.steps[step].rpartition(".")[0]
        return step + 1 == len(self.steps) or self.steps[step + 1].rpartition(".")[0] != here


def schedule_of(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> BlockSchedule:
    """Watch one forward pass.

    Args:
        model: the model.
        names: modules whose place is to be known.
        run: makes a small forward pass.

    Returns:
        Which blocks are called one after the other, and where the named modules are.

    Raises:
        LayerwiseError: there are no blocks, or one is called inside another.
    """
    blocks = blocks_of(names, model)
    steps: list[str] = []
    inside: list[str] = []
    segments: dict[str, list[int]] = {}
    between: set[str] = set()

    def enter(block: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if inside:
                raise LayerwiseError(f"{block} is called inside {inside[-1]}")
            inside.append(block)
            steps.append(block)

        return hook

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            here = len(steps) - 1 if inside else len(steps)
            if not inside:
                between.add(name)
            if here not in segments.setdefault(name, []):
                segments[name].append(here)

        return hook

    handles = [model.get_submodule(block).register_forward_pre_hook(enter(block)) for block in blocks]
    handles += [model.get_submodule(block).register_forward_hook(lambda *_: inside.clear()) for block in blocks]
    handles += [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if name not in segments:  # not called this time, as an expert that no token was routed to
            block = block_of(name, model)
            segments[name] = [step for step, called in enumerate(steps) if called == block]
    if len(steps) < 2:
        raise LayerwiseError("it has no list of blocks")
    return BlockSchedule(
        tuple(steps), {name: tuple(found) for name, found in segments.items() if found}, frozenset(between)
    )


def split_by_block(groups: Mapping[str, Sequence[str]], model: nn.Module) -> dict[str, dict[str, tuple[str, ...]]]:
    """Groups by the block that holds their leader; what is in no block comes under an empty name."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for leader, members in groups.items():
        found.setdefault(block_of(leader, model) or "", {})[leader] = tuple(members)
    return found
