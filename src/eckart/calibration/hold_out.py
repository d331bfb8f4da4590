"""Calibration data, divided: what the statistics read, what a refinement reads too, and what is measured on."""

from __future__ import annotations

from eckart.data import Batch, CalibrationData


def hold_out(loaded: CalibrationData, count: int) -> tuple[CalibrationData, CalibrationData | None]:
    """Take `count` batches, evenly spaced, away from the calibration data, to measure on.

    Args:
        loaded: all batches.
        count: how many to hold out; 0 for none.

    Returns:
        The batches to calibrate on and the others, each with its description.
    """
    if count == 0:
        return loaded, None
    rest, held = _spaced(loaded.batches, count)
    description = {
        **loaded.description,
        "calibration_examples": sum(len(batch) for batch in rest),
        "calibration_tokens": sum(batch.num_tokens for batch in rest),
        "held_out_examples": sum(len(batch) for batch in held),
    }
    return CalibrationData(rest, description), CalibrationData(held, description)


def take_samples(data: CalibrationData, samples: int) -> CalibrationData:
    """Some of the batches, evenly spaced, that hold so many samples or a few more; all where there are no more."""
    there = data.num_examples
    if there <= samples:
        return data
    _, taken = _spaced(data.batches, -(-len(data) * samples // there))
    description = {
        **data.description,
        "calibration_examples": sum(len(batch) for batch in taken),
        "calibration_tokens": sum(batch.num_tokens for batch in taken),
    }
    return CalibrationData(taken, description)


def _spaced(batches: list[Batch], count: int) -> tuple[list[Batch], list[Batch]]:
    """The batches without `count` evenly spaced ones, and those."""
    step = len(batches) / count
    chosen = {int(step * (i + 0.5)) for i in range(count)}
    rest, taken = ([batch for i, batch in enumerate(batches) if (i in chosen) == own] for own in (False, True))
    return rest, taken
