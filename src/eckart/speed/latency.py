"""The latency of two models on one batch of their data, for reports of compressions and evaluations."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eckart.data.inference import device_of, evaluating
from eckart.speed.clock import measure_in_turn
from eckart.speed.profile import name_of_dtype


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
    with evaluating(*models.values()):
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
