"""Labeled rows: what classifiers and sentence embeddings are scored on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from eckart.data.columns import (
    find_label_column,
    find_pair_column,
    find_text_column,
    peek_rows,
    require_column,
)
from eckart.data.examples import TextExample, example_of
from eckart.data.labels import Label, labels_of
from eckart.data.source import open_source


@dataclass(frozen=True)
class TaskRow:
    """One labeled text, or pair of texts.

    Attributes:
        text: The text, with the second one as its pair.
        label: A class number, a score, or a list of either's numbers, see :func:`eckart.data.labels.labels_of`.
    """

    text: TextExample
    label: Label


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
    def labels(self) -> list[Label]:
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
    multi_label: bool | None = False,
    outputs: int | None = None,
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
        multi_label: Whether several classes may hold at once; None to tell by the labels, which are lists then.
        outputs: Numbers that the model gives for a row; None if that is not known.
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
    labels = labels_of(
        chosen, label, label2id=label2id, regression=regression, multi_label=multi_label, outputs=outputs
    )
    examples = [example_of(row, column, pair_column) for row in chosen]
    found = [TaskRow(example, value) for example, value in zip(examples, labels, strict=True)]
    columns = {"column": column, "pair_column": pair_column, "label_column": label}
    return TaskData(found, {**source.description, **columns, "rows": len(found)})
