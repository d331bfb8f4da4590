"""Run a model over calibration data, and gather what the metrics ask for."""

from eckart.calibrate.bar import show_steps
from eckart.calibrate.calibration import Calibration, calibrate, without_data
from eckart.calibrate.held_out import hold_out
from eckart.calibrate.useless import too_few, why_useless

__all__ = ["Calibration", "calibrate", "hold_out", "show_steps", "too_few", "why_useless", "without_data"]
