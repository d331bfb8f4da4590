"""Part of the calibration data, to measure on."""

from __future__ import annotations

from eckart.data import CalibrationData


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
    step = len(loaded) / count
    chosen = {int(step * (i + 0.5)) for i in range(count)}
    parts = [[batch for i, batch in enumerate(loaded.batches) if (i in chosen) == held] for held in (False, True)]
    description = {
        **loaded.description,
        "calibration_examples": sum(len(batch) for batch in parts[0]),
        "calibration_tokens": sum(batch.num_tokens for batch in parts[0]),
        "held_out_examples": sum(len(batch) for batch in parts[1]),
    }
    return CalibrationData(parts[0], description), CalibrationData(parts[1], description)
