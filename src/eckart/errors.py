"""What failed, where, and what to do: every refusal of eckart is one of these.

A message has three parts, and tests hold every raise to it: what is wrong, the place (file, site,
key, field) and the remedy. The command line prints the message without a traceback and exits with
``exit_code``.
"""

from __future__ import annotations

import errno


class EckartError(Exception):
    """A run that could not go on. The message names the place and the remedy."""

    exit_code = 1


class UsageError(EckartError, ValueError):
    """What was asked for is not possible as asked: an option, a pattern, a recipe or a plan."""

    exit_code = 2


class DataError(EckartError):
    """Calibration or evaluation data that cannot be had, read or used."""


class CheckpointError(EckartError):
    """A model folder that cannot be read, trusted or written."""


class ModelError(EckartError):
    """A model that holds nothing to factor, or is already factored or quantized."""


class OtherProcessError(EckartError):
    """Another process failed and reports its own error; this one stops because of it."""


class NumericalError(EckartError):
    """Numbers that are not finite, or a decomposition that failed even in float64."""


# How allocators say it where the error has no type of its own: the CPU's, CUDA's, cuBLAS's.
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")

LESS_MEMORY = (
    "Lower --batch-size, --max-seq-length or --num-samples, or work block by block: --stream on; or use a machine with "
    "more memory."
)
"""What helps against errors of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or on an accelerator."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; it may not be imported
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)
