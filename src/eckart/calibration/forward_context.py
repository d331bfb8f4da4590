"""A model made ready to run: evaluation mode, and its weights brought in as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

from eckart.data.inference import evaluating
from eckart.model import WeightLoader

ForwardContext = Callable[[str | None], AbstractContextManager[None]]
"""Entered around passes through a model; given a block, its weights stay in place for all passes inside."""


def forward_context(model: nn.Module, weights: WeightLoader, blocks: Sequence[str]) -> ForwardContext:
    """The context in which a model runs.

    Args:
        model: the model.
        weights: its weights.
        blocks: what is brought in as a whole, while it runs.
    """

    @contextmanager
    def context(block: str | None = None) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            stack.enter_context(weights.streaming(blocks))
            if block is not None:
                stack.enter_context(weights.held(block))
            yield

    return context
