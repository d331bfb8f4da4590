"""Hold what an engine computes against what the model computes, on shapes that were not traced."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eckart.errors import CheckpointError
from eckart.exports.engines.ports import TRIED, TRIED_CAUSAL, fitting
from eckart.exports.engines.trace import Graph

Runner = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""An engine with a graph loaded: arrays in and out, by name."""

TOLERANCE = 1e-4
"""Largest norm of the difference over the norm of the output, without quantization: rounding in another order."""

USELESS = 1.0
"""The same with quantization: beyond it, an output of zeros would be nearer."""


def compare(graph: Graph, runner: Runner, engine: str, *, quantized: bool = False) -> dict[str, Any]:
    """Run engine and model on the same batches.

    Padding is left out: what stands there is nobody's.

    Args:
        graph: of the model.
        runner: of what was written.
        engine: its name, for messages.
        quantized: whether its weights are rounded.

    Returns:
        What was compared: the largest relative difference by output, keys and values together; the shapes; and the
        bound.

    Raises:
        CheckpointError: another shape, numbers that are not finite, or a difference beyond the bound.
    """
    bound = USELESS if quantized else TOLERANCE
    shapes = fitting(TRIED_CAUSAL if graph.causal else TRIED, graph.model)
    largest: dict[str, float] = {}
    for seed, shape in enumerate(shapes):
        batch = graph.batch(shape, seed + 1)
        wanted = graph.run(batch)
        found = runner({name: tensor.numpy() for name, tensor in batch.items()})
        for name, expected in wanted.items():
            real = real_places(expected, batch.get("attention_mask"), shape.length)
            difference = relative_difference(torch.from_numpy(np.asarray(found[name])), expected, real)
            if not difference <= bound:
                what = "rounding the weights changes" if quantized else "what was written is not the model:"
                remedy = "Leave out --quantize, or choose int8." if quantized else "Please report this with its name."
                raise CheckpointError(
                    f"{type(graph.model).__name__} in {engine}: {what} {name} by {difference:.2g} of its norm for "
                    f"{shape.batch} texts of {shape.length} tokens after {shape.past} (allowed: {bound:g}); nothing "
                    f"was published. {remedy}"
                )
            key = "keys and values" if name.startswith("present.") else name
            largest[key] = max(largest.get(key, 0.0), difference)
    tried = [f"{shape.batch} x {shape.length}" + (f" after {shape.past}" if shape.past else "") for shape in shapes]
    return {"largest_relative_difference": largest, "tried": tried, "allowed": bound}


def relative_difference(found: Tensor, wanted: Tensor, real: Tensor | None = None) -> float:
    """`|found - wanted| / |wanted|` where `real`; infinite for another shape or numbers that are not finite."""
    if found.shape != wanted.shape:
        return math.inf
    found, wanted = found.double(), wanted.double()
    if real is not None:
        found, wanted = found[real], wanted[real]
    if not found.isfinite().all():
        return math.inf
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def real_places(output: Tensor, mask: Tensor | None, length: int) -> Tensor | None:
    """Boolean index of an output that leaves padding out; None where it has no axis of tokens.

    Args:
        output: (B, T, ...), or (B, heads, past + T, d) of keys and values.
        mask: (B, past + T).
        length: T.
    """
    if mask is None:
        return None
    mask = mask.bool()
    if output.dim() == 4 and output.shape[2] == mask.shape[1]:
        return mask[:, None].expand(output.shape[:3])
    if output.dim() >= 2 and output.shape[:2] == (len(mask), length):
        return mask[:, -length:]
    return None
