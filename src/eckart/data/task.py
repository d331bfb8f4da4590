"""Labeled rows: what classifiers and sentence embeddings are scored on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from transformers import PretrainedConfig

from eckart.data.columns import (
    cell_value,
    find_label_column,
    find_pair_column,
    find_text_column,
    peek_rows,
    require_column,
)
from eckart.data.examples import TextExample, example_of
from eckart.data.rows import DataRow
from eckart.data.source import open_source
from eckart.data.table import is_number
from eckart.errors import DataError


@dataclass(frozen=True)
class TaskRow:
    """One labeled text, or pair of texts.

    Attributes:
        text: The text, with the second one as its pair.
        label: A class number, or a score.
    """

    text: TextExample
    label: int | float


@dataclass
class TaskData:
    """The rows of a task.

    Attributes:
        rows: The rows, in the order of the data.
        description: Source, columns and number of rows, as JSON.
    """

    rows: list[TaskRow]
    description: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TaskRow]:
        return iter(self.rows)

    @property
    def texts(self) -> list[TextExample]:
        """The texts of all rows."""
        return [row.text for row in self.rows]

    @property
    def labels(self) -> list[int | float]:
        """The labels of all rows."""
        return [row.label for row in self.rows]


def load_task(
    data: Any,
    *,
    column: str | None = None,
    pair_column: str | None = None,
    label: str | None = None,
    label2id: Mapping[str, int] | None = None,
    regression: bool | None = None,
    config: str | None = None,
    split: str = "validation",
    revision: str | None = None,
    num_samples: int | None = None,
) -> TaskData:
    """Read labeled rows.

    Args:
        data: A .tsv, .csv or .jsonl file, a folder of such files, a hub identifier, a `datasets.Dataset`, a data frame
            or a list of dictionaries. Tables without a header have their columns by number: "0", "1".
        column: The text; None for the column called text, sentence or content, or the only textual one.
        pair_column: The second text, where there is one; None for the column that belongs to the first by its name,
            such as sentence2 to sentence1, if that was not named either.
        label: The label; None for the column called label, labels or score, or the only one of numbers.
        label2id: Maps labels that are words: the model's `config.label2id`.
        regression: True for scores, False for classes, None to tell by the labels (scores if one has a fraction
            or a decimal point).
        config: The hub data set's configuration.
        split: The hub data set's split.
        revision: The hub data set's revision.
        num_samples: The first so many rows only; None for all.

    Returns:
        The rows.

    Raises:
        DataError: If a column cannot be settled or a row is bad.
    """
    asked = tuple(name for name in (column, pair_column, label) if name is not None)
    source = open_source(data, config=config, split=split, revision=revision, asked=asked)
    first, rows = peek_rows(source.rows, source.name)
    named = column
    column = find_text_column(first, source.name, asked=column, taken=(pair_column, label))
    if named is None and pair_column is None:
        pair_column = find_pair_column(first, column, taken=(label,))
    label = find_label_column(first, source.name, asked=label, taken=(column, pair_column))
    if pair_column is not None:
        require_column(pair_column, first, source.name)
    chosen = sorted(islice(rows, num_samples), key=lambda row: row.index)
    labels = labels_of(chosen, label, label2id=label2id, regression=regression)
    examples = [example_of(row, column, pair_column) for row in chosen]
    found = [TaskRow(example, value) for example, value in zip(examples, labels, strict=True)]
    columns = {"column": column, "pair_column": pair_column, "label_column": label}
    return TaskData(found, {**source.description, **columns, "rows": len(found)})


def class_labels(rows: Sequence[DataRow], column: str, config: PretrainedConfig) -> list[int | float]:
    """Read the labels of rows for a model with a classification or regression head.

    Raises:
        DataError: If a label is not one of the model's.
    """
    regression = config.num_labels == 1 or config.problem_type == "regression"
    label2id = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    labels = labels_of(rows, column, label2id=label2id, regression=regression)
    classes = config.num_labels or 0
    for row, label in zip(rows, labels, strict=True):
        if not regression and label >= classes:
            raise DataError(
                f"{row.where}: label {label} in column {column!r}, but the model has {classes} classes "
                "(0 first): correct the row, or load a model with as many"
            )
    return labels


def labels_of(
    rows: Sequence[DataRow], column: str, *, label2id: Mapping[str, int] | None, regression: bool | None
) -> list[int | float]:
    """Read the labels of rows.

    Args:
        rows: The rows.
        column: Their label column.
        label2id: Maps labels that are words.
        regression: True for scores, False for classes, None decides by the labels.

    Returns:
        A number for each row: whole numbers for classes.

    Raises:
        DataError: If a label is not a number and is not in `label2id`, or is not a class number.
    """
    values = [cell_value(row, column) for row in rows]
    if regression is None:
        regression = any(
            isinstance(value, float) or (isinstance(value, str) and is_number(value) and not _is_whole(value))
            for value in values
        )
    return [_label(value, row, column, label2id, regression) for value, row in zip(values, rows, strict=True)]


def _label(value: Any, row: DataRow, column: str, label2id: Mapping[str, int] | None, regression: bool) -> int | float:
    where = f"{row.where}: label {value!r} in column {column!r}"
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


def _is_whole(value: str) -> bool:
    return value.strip().lstrip("+-").isdigit()
