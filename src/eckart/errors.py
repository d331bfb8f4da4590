"""What failed, where, and what to do: every refusal of eckart is one of these.

A message has three parts, and tests hold every raise to it: what is wrong, the place (file, site,
key, field) and the remedy. The command line prints the message without a traceback and exits with
``exit_code``.
"""

from __future__ import annotations


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
