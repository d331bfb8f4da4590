"""Calibration text and labeled tasks."""

from eckart.data.batch import Batch, CalibrationData
from eckart.data.kind import Kind, kind_of, max_positions
from eckart.data.loading import load
from eckart.data.pooling import Pooling
from eckart.data.task import TaskData, TaskRow, load_task

__all__ = [
    "Batch",
    "CalibrationData",
    "Kind",
    "Pooling",
    "TaskData",
    "TaskRow",
    "kind_of",
    "load",
    "load_task",
    "max_positions",
]
