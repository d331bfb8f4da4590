"""Measure how near the compressed model is to the original on text kept back from calibration, and how fast."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.calibration.layerwise import all_blocks
from eckart.compression.context import CompressionContext
from eckart.errors import DataError, UsageError
from eckart.evaluation import quality
from eckart.model import WeightLoader, cast, fuse_experts, shared_clone
from eckart.speed.latency import compare_latency, measure_latency, time_where_memory_allows


def measure_quality(context: CompressionContext, compressed: PreTrainedModel) -> dict[str, Any]:
    """Compare outputs on the held-out batches; the first process does, for all of them.

    Returns:
        What was measured; nothing where the model puts out nothing that can be compared, which `context.unmeasured`
        then says: what took hours to compute is not thrown away for that.
    """
    assert context.held_out is not None
    if context.unmeasured is not None:
        return {}
    processes = context.workspace.processes
    measured: dict[str, Any] = {}
    failed: BaseException | None = None
    if processes.main:
        blocks = all_blocks(context.model)
        smaller = WeightLoader(compressed, context.workspace.compute_stored)
        try:
            with context.weights.streaming(blocks), smaller.streaming(blocks):
                measured = quality.measure_quality(compressed, context.model, context.held_out, context.pooling)
        except (UsageError, DataError) as error:
            measured = {"unmeasured": str(error)}
        except Exception as error:
            failed = error
    processes.raise_if_any_failed(failed)
    found: dict[str, Any] = processes.broadcast(measured)
    if "unmeasured" in found:
        context.unmeasured = f"the quality was not measured: {found['unmeasured']}"
        return {}
    return found


def time_models(context: CompressionContext, compressed: PreTrainedModel) -> dict[str, Any] | None:
    """Latency of the original and the compressed model in the type that is stored, in turn.

    On a batch of the held-out or calibration data; where there is none, on random inputs. None where a model is larger
    than memory, or several processes share the machine.
    """
    workspace = context.workspace
    if workspace.streaming or workspace.processes.size > 1:
        return None
    data = context.data if context.held_out is None else context.held_out

    def measure() -> dict[str, Any] | None:
        models = {
            name: copy_to_time(model, compressed.dtype, context.weights.device)
            for name, model in (("original", context.model), ("eckart", compressed))
        }
        return measure_latency(models) if data is None else compare_latency(models, next(iter(data)).inputs)

    return time_where_memory_allows(measure)


def copy_to_time(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A copy of a model as it will run: in that type and place, experts that were separated to be factored fused."""
    clone = shared_clone(model)
    cast(clone, dtype)
    fuse_experts(clone)
    clone.to(device)  # type: ignore[arg-type]
    return clone.eval()
