"""What to do when a batch does not fit in memory: tell it from other errors, and make room for a smaller one."""

from __future__ import annotations

import gc

import torch

# How allocators say it where the error has no type of its own: the CPU's, CUDA's, cuBLAS's.
WORDS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or on an accelerator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in WORDS)


def release() -> None:
    """Give back what a failed run left behind; the error itself must be gone, it holds on to all of the run."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
