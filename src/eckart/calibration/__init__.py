"""Run a model over calibration data, and gather what the metrics ask for."""

from eckart.calibration.calibration import Calibration, calibrate, without_data
from eckart.calibration.coverage import too_few, why_useless
from eckart.calibration.hold_out import hold_out
from eckart.calibration.progress import show_steps

__all__ = ["Calibration", "calibrate", "hold_out", "show_steps", "too_few", "why_useless", "without_data"]
