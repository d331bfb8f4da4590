"""Rows drawn of data that have more of them than are needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from eckart.data.columns import text_of
from eckart.data.rows import DataRow
from eckart.data.source import RowSource
from eckart.errors import DataError

logger = logging.getLogger(__name__)


def choose_rows(source: RowSource, column: str, tokenizer: Any, count: int, seed: int) -> list[DataRow]:
    """Choose rows that hold text, uniformly without replacement.

    Data in random order are read only until there are enough.

    Raises:
        DataError: If no row holds text.
    """
    texts = (row for row in source.rows if text_of(row, column, tokenizer)[0].strip())
    chosen = draw_rows(texts, count, seed, in_order=source.sampled)
    if not chosen:
        raise DataError(f"{source.name}: column {column!r} holds no text: pass data that hold text")
    if len(chosen) < count:
        logger.info("%s: %d texts, %d were asked for", source.name, len(chosen), count)
    return chosen


def draw_rows(rows: Iterator[DataRow], count: int, seed: int, *, in_order: bool) -> list[DataRow]:
    """Draw rows uniformly without replacement; the first ones where they are `in_order` of chance already."""
    if in_order:
        return list(islice(rows, count))
    chosen = list(rows)
    if len(chosen) > count:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen = [chosen[place] for place in order[:count].sort().values.tolist()]
    return chosen
