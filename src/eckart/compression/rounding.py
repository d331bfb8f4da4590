"""Round the compressed model to few bits, and measure what that cost beside the model in floating point."""

from __future__ import annotations

from collections import Counter
from typing import Any

from transformers import PreTrainedModel

from eckart.compression.context import CompressionContext
from eckart.compression.measure import measure_quality, time_models
from eckart.evaluation.sizes import count_sizes
from eckart.model import cast, fuse_experts, shared_clone
from eckart.quantization import quantize
from eckart.report.compression import list_quality


def round_compressed(
    context: CompressionContext, compressed: PreTrainedModel, kind: str, measured: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, dict[str, Any], list[str]]:
    """Quantize the compressed model, in place.

    Args:
        context: the original and its held-out text.
        compressed: in floating point.
        kind: one of :data:`eckart.quantization.KINDS`.
        measured: its quality, where it was measured already.

    Returns:
        The quality of the rounded model; for the report, how it was rounded and what the model was `before`; notes.
    """
    if context.held_out is not None and measured is None:
        measured = measure_quality(context, compressed) or None
    before = {"size": count_sizes(compressed).model.as_dict(), "quality": measured}
    done = quantize(compressed, kind)
    record = {
        "kind": kind,
        "layers": len(done.layers),
        "left": dict(Counter(done.left.values())),
        "before": before,
    }
    after = measure_quality(context, compressed) or None if context.held_out is not None else None
    return after, record, list(done.notes)


def round_dense(context: CompressionContext, kind: str, *, timed: bool) -> dict[str, Any]:
    """What the original becomes where it is rounded the same way and nothing is factored: for a row beside the others.

    Args:
        context: the original and its held-out text.
        kind: one of :data:`eckart.quantization.KINDS`.
        timed: whether a forward pass is timed, beside the original's.

    Returns:
        `kind`, sizes, `quality` on held-out text, `latency` or None.
    """
    model = shared_clone(context.model)
    if context.dtype_on_disk is not None:
        cast(model, context.dtype_on_disk)
    quantize(model, kind)
    fuse_experts(model)
    measured = measure_quality(context, model) or None if context.held_out is not None else None
    return {
        "kind": kind,
        **count_sizes(model).model.as_dict(),
        "quality": list_quality({"quality": measured}),
        "latency": time_models(context, model) if timed else None,
    }
