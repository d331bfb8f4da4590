"""Run a model over calibration data, and gather what the metrics ask for."""

from eckart.calibration.calibration import Calibration, calibrate, calibrate_without_data
from eckart.calibration.coverage import NO_GRADIENT, UNREACHED, note_few_tokens, why_useless
from eckart.calibration.hold_out import hold_out, take_samples
from eckart.calibration.progress import show_steps

__all__ = [
    "NO_GRADIENT",
    "UNREACHED",
    "Calibration",
    "calibrate",
    "calibrate_without_data",
    "hold_out",
    "note_few_tokens",
    "show_steps",
    "take_samples",
    "why_useless",
]
