"""Labels of rows: classes, scores, and several of either for one text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from torch import Tensor
from transformers import PretrainedConfig

from eckart.data.columns import cell_value
from eckart.data.model_kind import problem_of
from eckart.data.rows import DataRow
from eckart.data.table import is_number
from eckart.errors import DataError

Label = int | float | list[float]
"""A class, a score, or a list of numbers: 0 or 1 for each class that may hold, or scores."""


def class_labels(rows: Sequence[DataRow], column: str, config: PretrainedConfig) -> list[Label]:
    """Read the labels of rows for a model with a classification or regression head.

    Raises:
        DataError: If a label is not one of the model's.
    """
    problem, outputs = problem_of(config), config.num_labels or 0
    label2id = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    return labels_of(
        rows,
        column,
        label2id=label2id,
        regression=problem == "regression",
        multi_label=problem == "multi_label_classification",
        outputs=outputs,
    )


def labels_of(
    rows: Sequence[DataRow],
    column: str,
    *,
    label2id: Mapping[str, int] | None,
    regression: bool | None,
    multi_label: bool | None = False,
    outputs: int | None = None,
) -> list[Label]:
    """Read the labels of rows.

    Args:
        rows: The rows.
        column: Their label column.
        label2id: Maps labels that are words.
        regression: True for scores, False for classes, None decides by the labels.
        multi_label: Whether several classes may hold at once; None decides by the labels.
        outputs: Numbers that the model gives for a row; None if that is not known.

    Returns:
        A label for each row: whole numbers for classes; lists of 0 and 1 where several classes may hold, which are
        given so or as lists of the classes that do; lists of scores for a regression of several.

    Raises:
        DataError: If a label is not a number and is not in `label2id`, or is no label of such a model.
    """
    values = [_plain(cell_value(row, column)) for row in rows]
    lists = [isinstance(value, list) for value in values]
    if multi_label is None:
        multi_label = not regression and bool(lists) and all(lists)
    if multi_label:
        return _label_sets(values, rows, column, label2id, outputs)
    if regression is None:
        regression = any(
            isinstance(value, float) or (isinstance(value, str) and is_number(value) and not _is_whole(value))
            for value in values
        )
    if regression and (outputs or 1) > 1:
        return [_scores(value, row, column, int(outputs or 1)) for value, row in zip(values, rows, strict=True)]
    found: list[Label] = []
    for value, row in zip(values, rows, strict=True):
        label = _label(value, row, column, label2id, regression)
        if not regression and outputs is not None and label >= outputs:
            raise DataError(
                f"{row.where}: label {label} in column {column!r}, but the model has {outputs} classes "
                "(0 first): correct the row, or load a model with as many"
            )
        found.append(label)
    return found


def _label(value: Any, row: DataRow, column: str, label2id: Mapping[str, int] | None, regression: bool) -> int | float:
    where = f"{row.where}: label {value!r} in column {column!r}"
    if isinstance(value, list):
        raise DataError(
            f"{where} is a list, and this head gives one {'score' if regression else 'class'} a text: name another "
            "column (--data-label-column); where several classes hold at once, set config.problem_type = "
            '"multi_label_classification"'
        )
    if isinstance(value, str) and label2id and value in label2id:
        return int(label2id[value])
    if not is_number(value):
        known = ", ".join(map(repr, label2id or ())) or "none"
        raise DataError(
            f"{where} is not a number and not in label2id (known: {known}): correct it, or set config.label2id"
        )
    number = float(value)
    if regression:
        if not math.isfinite(number):
            raise DataError(f"{where} is not finite: correct or remove the row")
        return number
    if not math.isfinite(number) or number != int(number) or number < 0:
        raise DataError(
            f"{where} is not a class (0, 1, ...): correct it; test splits without labels (-1) cannot be scored"
        )
    return int(number)


def _label_sets(
    values: Sequence[Any],
    rows: Sequence[DataRow],
    column: str,
    label2id: Mapping[str, int] | None,
    outputs: int | None,
) -> list[Label]:
    for value, row in zip(values, rows, strict=True):
        if not isinstance(value, list):
            raise DataError(
                f"{row.where}: label {value!r} in column {column!r} is no list, and this head holds several labels at "
                f"once: give the list of the classes that hold, or a 0 or 1 for each of {outputs or 'them'}"
            )
    widths = {len(value) for value in values}
    marked = all(isinstance(entry, int | float) and entry in (0, 1) for value in values for entry in value)
    if marked and len(widths) == 1 and (widths == {outputs} or (outputs is None and widths != {1})):
        return [[float(entry) for entry in value] for value in values]
    held = [
        [int(_label(entry, row, column, label2id, False)) for entry in value]
        for value, row in zip(values, rows, strict=True)
    ]
    count = outputs if outputs is not None else max([1, *(1 + max(classes, default=0) for classes in held)])
    for classes, row in zip(held, rows, strict=True):
        if any(one >= count for one in classes):
            raise DataError(
                f"{row.where}: label {max(classes)} in column {column!r}, but the model has {count} classes "
                "(0 first): correct the row, or load a model with as many"
            )
    return [[float(number in classes) for number in range(count)] for classes in map(set, held)]


def _scores(value: Any, row: DataRow, column: str, outputs: int) -> list[float]:
    if not isinstance(value, list) or len(value) != outputs:
        raise DataError(
            f"{row.where}: label {value!r} in column {column!r}, but the model gives {outputs} scores: give a list of "
            "as many numbers"
        )
    return [float(_label(entry, row, column, None, True)) for entry in value]


def _plain(value: Any) -> Any:
    """A list for whatever holds several labels: an array, a tensor, JSON in a cell of a table."""
    if isinstance(value, Tensor | numpy.ndarray):
        value = value.tolist()
    elif isinstance(value, tuple | set | frozenset):
        value = list(value)
    elif isinstance(value, str) and value.strip()[:1] == "[":
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        value = found if isinstance(found, list) else value
    return value


def _is_whole(value: str) -> bool:
    return value.strip().lstrip("+-").isdigit()
