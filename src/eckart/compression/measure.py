"""Measure how near the compressed model is to the original, on text that was kept back from calibration."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from eckart.calibration.layerwise import all_blocks
from eckart.compression.context import CompressionContext
from eckart.evaluation import quality
from eckart.model import WeightLoader


def measure_quality(context: CompressionContext, compressed: PreTrainedModel) -> dict[str, Any]:
    """Compare outputs on the held-out batches; the first process does, for all of them."""
    assert context.held_out is not None
    processes = context.workspace.processes
    measured: dict[str, Any] = {}
    failed: BaseException | None = None
    if processes.main:
        blocks = all_blocks(context.model)
        smaller = WeightLoader(compressed, context.workspace.compute_stored)
        try:
            with context.weights.streaming(blocks), smaller.streaming(blocks):
                measured = quality.measure_quality(compressed, context.model, context.held_out, context.pooling)
        except Exception as error:
            failed = error
    processes.raise_if_any_failed(failed)
    found: dict[str, Any] = processes.broadcast(measured)
    return found
