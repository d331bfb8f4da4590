"""Plain rounding to few bits: what a factored model of about the same bytes is held against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.errors import NumericalError, UsageError
from eckart.evaluation.sizes import count_sizes
from eckart.model import shared_clone

GROUP = 64
"""Weights of a row that share a scale at 4 bits."""

SCALE_BYTES = {8: 4, 4: 2}
"""Bytes a scale: float32 for each row at 8 bits, float16 for each group at 4."""


@dataclass(frozen=True)
class RoundedModel:
    """A model with rounded weights.

    Attributes:
        model: A copy whose named weights are rounded, held in the dtype they had: simulated, not stored small.
        named_bytes: What the rounded weights and their scales would take when stored; tied weights once.
        model_bytes: What the whole model would take.
    """

    model: nn.Module
    named_bytes: int
    model_bytes: int


def round_weights(model: nn.Module, names: Iterable[str], bits: int) -> RoundedModel:
    """Round weights to the nearest of few levels, with no calibration.

    Symmetric, to nearest: int8 with one float32 scale an output row, or int4 in groups of 64 along a row with one
    float16 scale a group. The rounding is simulated in floating point; the bytes are what storing it would take.
    Biases stay as they are. Rounding a head that is tied to the embedding rounds the embedding too.

    Args:
        model: The model; it is not changed.
        names: Linear and Conv1D modules to round.
        bits: 8 or 4.

    Returns:
        The rounded copy and its bytes.

    Raises:
        UsageError: If a name is no such module, or `bits` is neither 8 nor 4.
        NumericalError: If a weight is not finite.
    """
    if bits not in SCALE_BYTES:
        raise UsageError(f"bits: {bits!r} is not supported: use 8 or 4")
    rounded = shared_clone(model)
    known = dict(rounded.named_modules())
    weights: dict[int, Tensor] = {}
    dense = stored = 0
    for name in names:
        module = known.get(name)
        if not isinstance(module, nn.Linear | Conv1D):
            found = "not in the model" if module is None else f"a {type(module).__name__}"
            raise UsageError(f"module {name!r} is {found}: name Linear or Conv1D modules")
        weight = module.weight
        if id(weight) in weights:
            continue
        weights[id(weight)] = weight
        if not bool(torch.isfinite(weight).all()):
            count = int((~torch.isfinite(weight)).sum())
            raise NumericalError(f"{name}.weight: {count} numbers are not finite: mend the checkpoint or leave it out")
        rows = weight.detach() if isinstance(module, nn.Linear) else weight.detach().T  # (out, in)
        nearest = round_to_nearest(rows, bits)
        with torch.no_grad():
            weight.data = nearest if isinstance(module, nn.Linear) else nearest.T.contiguous()
        dense += weight.numel() * weight.element_size()
        stored += count_rounded_bytes(rows.shape[0], rows.shape[1], bits)
    return RoundedModel(rounded, stored, count_sizes(model).model.bytes - dense + stored)


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Round a weight.

    Args:
        weight: (out, in).
        bits: 8 (a scale a row) or 4 (a scale every 64 weights of a row).

    Returns:
        The rounded weight in its own dtype.
    """
    outputs, inputs = weight.shape
    group = inputs if bits == 8 else GROUP
    short = -inputs % group
    padded = torch.nn.functional.pad(weight.float(), (0, short)).view(outputs, -1, group)  # (out, groups, group)
    levels = 2 ** (bits - 1) - 1
    scale = padded.abs().amax(-1, keepdim=True) / levels
    if bits == 4:
        # The scale is stored in 16 bits: round it first, and never to 0.
        scale = scale.clamp(max=65504.0).half().float().clamp(min=2.0**-24)
    scale = torch.where(scale > 0, scale, 1.0)
    nearest = (padded / scale).round().clamp(-levels, levels) * scale
    return nearest.view(outputs, -1)[:, :inputs].to(weight.dtype)


def count_rounded_bytes(outputs: int, inputs: int, bits: int) -> int:
    """Return what a rounded weight takes when stored.

    Args:
        outputs: Rows.
        inputs: Columns.
        bits: 8 or 4.

    Returns:
        Bytes of the integers and of their scales.
    """
    scales = outputs if bits == 8 else outputs * -(-inputs // GROUP)
    return -(-outputs * inputs * bits // 8) + scales * SCALE_BYTES[bits]
