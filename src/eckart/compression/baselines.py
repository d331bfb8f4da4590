"""What plain rounding of the original costs on the same held-out text: what a smaller model is held against."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from eckart.compression.context import CompressionContext
from eckart.compression.measure import measure_quality
from eckart.distributed.memory import free_memory
from eckart.errors import NumericalError
from eckart.evaluation.rounding import round_weights
from eckart.evaluation.sizes import count_sizes
from eckart.model import find_sites
from eckart.report.compression import list_quality
from eckart.speed.latency import time_where_memory_allows

logger = logging.getLogger(__name__)

BITS = (8, 4)


def measure_baselines(context: CompressionContext) -> list[dict[str, Any]]:
    """Round the original to int8 and to int4, simulated and without calibration, and measure each.

    Args:
        context: the original and its held-out text.

    Returns:
        `name`, sizes and `quality` of each; nothing without held-out text, where outputs cannot be compared, or where
        the weights of the sites do not fit into memory a second time.
    """
    workspace, model = context.workspace, context.model
    if context.held_out is None or context.unmeasured is not None:
        return []
    if workspace.streaming or workspace.processes.size > 1:
        return []
    names = [site.name for site in find_sites(model).chosen]
    weights = {id(weight): weight for name in names for weight in [model.get_submodule(name).get_parameter("weight")]}
    free = free_memory(context.weights.device)
    if free is not None and 2 * sum(weight.nbytes for weight in weights.values()) > free:
        return []
    dtype = context.dtype_on_disk or model.dtype
    matrices = sum(weight.numel() for weight in weights.values()) * dtype.itemsize
    before = count_sizes(model, dtype=dtype).model

    def measure() -> list[dict[str, Any]]:
        rows = []
        for bits in BITS:
            rounded = round_weights(model, names, bits)
            assert isinstance(rounded.model, PreTrainedModel)
            try:
                quality = list_quality({"quality": measure_quality(context, rounded.model) or None})
            except NumericalError as error:
                logger.info("the original in int%d is not measured: %s", bits, error)
                continue
            size = replace(before, bytes=before.bytes - matrices + rounded.named_bytes)
            rows.append({"name": f"original int{bits}", **size.as_dict(), "quality": quality})
        return rows

    return time_where_memory_allows(measure) or []
