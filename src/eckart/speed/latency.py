"""The latency of two models on one batch of their data, for reports of compressions and evaluations."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.data.inference import device_of, evaluating
from eckart.data.last_token import padding_named, tell_padding
from eckart.data.model_kind import max_positions
from eckart.errors import is_out_of_memory
from eckart.speed.clock import measure_in_turn
from eckart.speed.phases import MADE_UP, random_inputs
from eckart.speed.profile import name_of_dtype

logger = logging.getLogger(__name__)

T = TypeVar("T")

BATCH, LENGTH = 8, 128
"""Of inputs that are made up; fewer tokens where the model has fewer positions."""


def time_where_memory_allows(measure: Callable[[], T]) -> T | None:
    """What is measured; None with a warning where memory runs out: what a run has found besides is not lost for it."""
    try:
        return measure()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    logger.warning("the speed is not measured: out of memory. Lower --batch-size or --max-seq-length to have it.")
    return None


def measure_latency(
    models: Mapping[str, PreTrainedModel], batch: int | None = None, length: int | None = None
) -> dict[str, Any] | None:
    """What :func:`compare_latency` finds on random inputs; None for models that read neither tokens nor images.

    Args:
        models: as for :func:`compare_latency`.
        batch: texts at a time; None for :data:`BATCH`.
        length: tokens of a text; None for :data:`LENGTH`; fewer where the model has fewer positions.
    """
    first = next(iter(models.values()))
    if first.main_input_name not in MADE_UP:
        return None
    limit = max_positions(first.config, first)
    length = length or LENGTH
    return compare_latency(models, random_inputs(first, batch or BATCH, min(length, limit or length)))


def compare_latency(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], *, repeats: int = 5, min_seconds: float = 0.2
) -> dict[str, Any]:
    """Time a forward pass of each model on one batch, in turn.

    Args:
        models: name -> model, on one device and of one type; the first one is the original.
        inputs: of a batch; labels are left out.
        repeats: turns of each model, at least.
        min_seconds: seconds that a model is timed for, at least.

    Returns:
        `batch`, `length`, `device`, `dtype`, `threads`; `seconds`: name -> median and quartiles of one pass;
        `speedup`: name -> how many times as fast as the first one. All plain JSON values.
    """
    first = next(iter(models.values()))
    device = device_of(first)
    dtype = next((p.dtype for p in first.parameters() if p.is_floating_point()), torch.float32)
    moved = {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
        if name != "labels"
    }
    shape = next(iter(moved.values())).shape
    moved, padding = tell_padding(first, moved)
    with evaluating(*models.values()), ExitStack() as stack:
        for model in models.values():
            stack.enter_context(padding_named(model, padding))
        runs = {name: partial(model, **moved, **_without_cache(model)) for name, model in models.items()}
        timings = measure_in_turn(runs, repeats=repeats, min_seconds=min_seconds, device=device)
    dense = next(iter(timings.values())).median
    return {
        "batch": shape[0],
        "length": shape[1] if len(shape) == 2 else None,
        "device": device.type,
        "dtype": name_of_dtype(dtype),
        "threads": torch.get_num_threads(),
        "seconds": {name: timing.as_dict() for name, timing in timings.items()},
        "speedup": {name: dense / timing.median for name, timing in timings.items()},
    }


def _without_cache(model: nn.Module) -> dict[str, bool]:
    return {name: False for name in ("use_cache", "use_mems") if name in inspect.signature(model.forward).parameters}
