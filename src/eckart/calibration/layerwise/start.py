"""A model before its first step, after one example has shown that it runs block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from eckart.calibration.forward_context import ForwardContext
from eckart.calibration.layerwise.hidden_states import HiddenStateStore
from eckart.calibration.layerwise.near_states import NearStates
from eckart.calibration.layerwise.runner import LayerwiseRunner
from eckart.calibration.layerwise.trace import trace_blocks
from eckart.data import Batch
from eckart.data.inference import forward
from eckart.distributed.memory import free_memory

NEAR = 0.2
"""The part of a GPU's free memory that the hidden states of one model may take; the rest of them goes to the store."""


def start_runner(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    example: Batch,
    store: HiddenStateStore,
    *,
    context: ForwardContext,
    device: torch.device,
    name: str,
    backward: bool = False,
    run: Callable[[Any], Any] | None = None,
) -> LayerwiseRunner:
    """Find the blocks of a model on one example, and make a runner of it.

    Args:
        model: the model.
        names: modules that will be looked at.
        batches: what it reads.
        example: a batch of one row.
        store: keeps hidden states.
        context: makes the model ready to run.
        device: where it computes.
        name: keeps runners apart that share the store.
        backward: whether it will be run backwards too.
        run: runs the model on a batch; None: a plain forward.

    Raises:
        LayerwiseError: it cannot be run block by block.
    """

    def plain(batch: Batch) -> Any:
        return forward(model, batch.inputs)

    if device.type == "cuda":
        memory = int(NEAR * (free_memory(device) or 0))
        store = NearStates(store, memory, everything=getattr(store, "durable", False))
    chain = trace_blocks(model, names, run or plain, example, store, backward=backward, context=context, device=device)
    return LayerwiseRunner(chain, batches, store, context=context, name=name)
