"""What to do when a batch does not fit in memory: tell it from other errors, and make room for a smaller one."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from eckart.errors import is_out_of_memory
from eckart.moments.current_batch import BatchLike

T = TypeVar("T")

logger = logging.getLogger(__name__)


def release() -> None:
    """Give back what a failed run left behind; the error itself must be gone, it holds on to all of the run."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Halving:
    """Runs batches, in halves, and halves of these, where memory runs out; later ones start at the size that fits.

    Attributes:
        max_rows: rows that are run at once; None: whole batches.
    """

    def __init__(self) -> None:
        self.max_rows: int | None = None

    def run(self, batch: BatchLike, call: Callable[[Any], None]) -> None:
        """Run a batch.

        Args:
            batch: what `call` is given, or parts of it.
            call: runs some rows. Where memory runs out it must have added nothing to any sum: it is called again.

        Raises:
            Exception: what `call` raises, memory that does not hold a single row included.
        """
        todo = [batch]
        while todo:
            part = todo.pop()
            size = len(part.examples)
            if self.max_rows is None or size <= self.max_rows:
                if _fits(part, call):
                    continue
                if self.max_rows is None:
                    logger.warning("out of memory at %d examples: continuing with half", size)
                self.max_rows = size // 2
                release()  # outside of the handler: the error that it held on to is gone
            todo += [part.rows(size // 2, size), part.rows(0, size // 2)]


def run_in_halves(batches: Iterable[Any], call: Callable[[Any], T]) -> Iterator[T]:
    """What a call makes of batches, in order; of parts of them where memory does not hold a whole one.

    Args:
        batches: with `examples` and `rows`.
        call: works on some rows and changes nothing else: where memory runs out it is called again with fewer.

    Yields:
        What each call returned.
    """
    halving = Halving()
    found: list[T] = []
    for batch in batches:
        halving.run(batch, lambda part: found.append(call(part)))
        yield from found
        found.clear()


def _fits(part: BatchLike, call: Callable[[Any], None]) -> bool:
    """Whether memory held some rows."""
    try:
        call(part)
    except Exception as error:
        if len(part.examples) < 2 or not is_out_of_memory(error):
            raise
        return False
    return True
