"""Larger batches for passes whose results do not depend on how the data are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.calibration.layerwise import all_blocks, split_by_block
from eckart.data import Batch
from eckart.model import dense_weight

CPU_TOKENS = 2048
"""Tokens of a batch from which on a CPU's products gain no more by larger ones."""

GPU_TOKENS = 16384
"""The same on a GPU, where launches cost more than the work of small batches."""

USABLE = 0.5
"""The part of a GPU's memory that passes may plan with: the rest is for hidden states, sums, and what is not known."""

FLOAT32 = 4


@dataclass(frozen=True)
class RunningMemory:
    """What a pass takes, in bytes.

    Attributes:
        per_token: of text.
        fixed: of weights.
    """

    per_token: int
    fixed: int


def running_memory(model: nn.Module, names: Sequence[str], *, backward: bool, blockwise: bool) -> RunningMemory:
    """Estimate what a pass takes.

    Args:
        model: the model.
        names: its sites.
        backward: whether gradients are wanted, for which all that the sites read and put out is kept.
        blockwise: whether one block runs at a time.
    """
    widths: dict[str, int] = {}
    for block, groups in split_by_block({name: (name,) for name in names}, model).items():
        widths[block] = sum(sum(dense_weight(model.get_submodule(name)).shape) for name in groups)
    here = max(widths.values(), default=0) if blockwise else sum(widths.values())
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    vocabulary = len(head) if isinstance(head, Tensor) else 0
    kept = 2 if backward else 1  # and as much again for the gradients
    per_token = FLOAT32 * (kept * here + 3 * kept * vocabulary)
    elements = sum(p.numel() for p in model.parameters())
    if blockwise:
        blocks = [sum(p.numel() for p in model.get_submodule(block).parameters()) for block in all_blocks(model)]
        elements -= sum(blocks) - max(blocks, default=0)
    return RunningMemory(max(1, per_token), FLOAT32 * elements)


def tokens_at_once(device: torch.device, memory: RunningMemory) -> int:
    """Tokens of a batch that a device runs well and has memory for.

    All of a GPU's memory is asked for, not what is free of it at the moment: two runs on one machine cut their batches
    alike, and so give the same bits. A batch that does not fit all the same is run in halves.

    Args:
        device: computes.
        memory: that a pass takes.
    """
    if device.type != "cuda":
        return CPU_TOKENS
    room = USABLE * torch.cuda.get_device_properties(device).total_memory - memory.fixed
    return int(min(GPU_TOKENS, max(0, room) // memory.per_token))


def grow_batches(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Join neighbors whose inputs differ in their number of rows alone, up to so many tokens, padding counted.

    Nothing is padded anew, so that every example runs as it would have: results are the same up to the rounding of
    float32, in which products of other sizes add up in another order.

    Args:
        batches: in their order, which stays.
        tokens: that a joined batch may have; larger ones stay as they are.
    """
    grown: list[list[Batch]] = []
    size = 0
    for batch in batches:
        here = sum(mask.numel() for mask in batch.masks().values())
        if grown and here and size + here <= tokens and _alike(grown[-1][-1], batch):
            grown[-1].append(batch)
            size += here
        else:
            grown.append([batch])
            size = here
    return [_join(group) for group in grown]


def _alike(one: Batch, other: Batch) -> bool:
    """Whether two batches have the same inputs, each with a row for every example, of the same shapes."""
    if one.inputs.keys() != other.inputs.keys():
        return False
    pairs = [(value, other.inputs[name]) for name, value in one.inputs.items()]
    rows = all(a.dim() and b.dim() and len(a) == len(one) and len(b) == len(other) for a, b in pairs)
    return rows and all(a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in pairs)


def _join(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    inputs = {name: torch.cat([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}
    return Batch(inputs, tuple(example for batch in batches for example in batch.examples))
