"""Rows drawn of data that have more of them than are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from eckart.data.columns import text_of
from eckart.data.rows import DataRow
from eckart.data.source import RowSource
from eckart.errors import DataError


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
    return chosen


@dataclass(frozen=True)
class Wanted:
    """How many samples are to be read.

    Attributes:
        number: of them, without those that are read on top to measure on.
        asked: whether the user said so; else it is the default.
    """

    number: int
    asked: bool

    def describe_lack(self, source: str, found: int, what: str) -> list[str]:
        """What to warn of where there are fewer; empty where there are enough.

        Args:
            source: name of the data.
            found: samples that there are.
            what: they are, in words.
        """
        if found >= self.number:
            return []
        wanted = f", {self.number:,} were asked for" if self.asked else f"; {self.number:,} are read where there are"
        return [f"{source}: {found:,} {what}{wanted}"]


def draw_rows(rows: Iterator[DataRow], count: int, seed: int, *, in_order: bool) -> list[DataRow]:
    """Draw rows uniformly without replacement; the first ones where they are `in_order` of chance already."""
    if in_order:
        return list(islice(rows, count))
    chosen = list(rows)
    if len(chosen) > count:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen = [chosen[place] for place in order[:count].sort().values.tolist()]
    return chosen
