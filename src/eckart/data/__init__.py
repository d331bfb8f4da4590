"""Calibration text and labeled tasks. What comes from the hub imports `datasets`, and only when it is asked for."""

from eckart.data.auto_classes import head_classes
from eckart.data.batch import Batch, CalibrationData
from eckart.data.digest import digest_batches, digest_rows
from eckart.data.loading import MODEL_READY, load_data
from eckart.data.model_kind import ModelKind, max_positions, model_kind
from eckart.data.pooling import Pooling
from eckart.data.source import require_data
from eckart.data.task import TaskData, TaskRow, load_task

__all__ = [
    "MODEL_READY",
    "Batch",
    "CalibrationData",
    "ModelKind",
    "Pooling",
    "TaskData",
    "TaskRow",
    "digest_batches",
    "digest_rows",
    "head_classes",
    "load_data",
    "load_task",
    "max_positions",
    "model_kind",
    "require_data",
]
