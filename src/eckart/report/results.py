"""Measured numbers in the form in which the hub reads them: the `model-index` of a model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult

TEXT = "text"
"""Stands for the name of a data set that is not on the hub."""


def list_results(
    scores: Mapping[str, float], data: Mapping[str, Any] | None, on: str | None, task: str | None
) -> list[EvalResult]:
    """One entry for each number that is finite.

    Args:
        scores: name of the metric -> number.
        data: what a report says of the data: `source`, and of a hub data set its `config` and `split`. Of a file or
            folder only the last part of its name is told.
        on: what part of the data, where it is not a split that the data set names.
        task: what the hub calls the task.
    """
    data = data or {}
    source = str(data.get("source") or "the data given")
    named = "config" in data  # of the hub: see eckart.data.hub
    shown = source if named else PurePath(source).name
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=source if named else TEXT,
            dataset_name=f"{shown} ({on})" if on else shown,
            dataset_config=data.get("config"),
            dataset_split=data.get("split") if named else None,
            metric_type=_identifier(name),
            metric_name=name,
            metric_value=value,
        )
        for name, value in scores.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _identifier(name: str) -> str:
    return "_".join("".join(sign if sign.isalnum() else " " for sign in name.lower()).split())
