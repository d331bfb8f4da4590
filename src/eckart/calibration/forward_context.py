"""A model made ready to run: evaluation mode, and its weights brought in as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

from eckart.data.inference import evaluating
from eckart.model import WeightLoader

Holder = Callable[[str | None], AbstractContextManager[None]]


def ready(model: nn.Module, weights: WeightLoader, blocks: Sequence[str]) -> Holder:
    """What is to be entered around passes through a model.

    Args:
        model: the model.
        weights: its weights.
        blocks: what is brought in as a whole, while it runs.

    Returns:
        A context, given the block that stays at hand for all passes inside, or None.
    """

    @contextmanager
    def holding(block: str | None = None) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            stack.enter_context(weights.streaming(blocks))
            if block is not None:
                stack.enter_context(weights.held(block))
            yield

    return holding
