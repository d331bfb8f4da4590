"""Models on the device that a tuning computes on, for as long as they are needed there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def on_device(device: torch.device, *models: nn.Module | None) -> Iterator[None]:
    """Models on a device, and on the CPU after it."""
    there: list[Any] = [model for model in models if model is not None]
    try:
        for model in there:
            model.to(device)
        yield
    finally:
        for model in there:
            model.to("cpu")
