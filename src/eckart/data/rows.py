"""Rows of .txt, .jsonl, .csv and .tsv files, each with its file and line.

Read with Python's csv and json: `datasets` takes seconds to import, needs to be told whether a table has a header, and
does not say which line of a file is wrong.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eckart.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv")
"""Files that can be read."""


@dataclass(frozen=True)
class DataRow:
    """One row of data.

    Attributes:
        values: Column name -> value.
        where: File and line, or data set and row: what an error message names.
        index: Its place in the data, from 0.
    """

    values: dict[str, Any]
    where: str
    index: int = 0


def read_path(path: Path, *, asked: Sequence[str] = (), whole_text: bool = False) -> Iterator[DataRow]:
    """Read a file, or the readable files of a folder in sorted order.

    Args:
        path: The file or folder.
        asked: Columns that the user named; they decide whether a .csv or .tsv file has a header.
        whole_text: A .txt file is one row, instead of one row per line.

    Yields:
        The rows, numbered through all files.

    Raises:
        DataError: If there is no such file, or a row is wrong; the message names file and line.
    """
    index = 0
    for file in _files(path):
        for values, line in _read_file(file, asked, whole_text):
            yield DataRow(values, f"{file}:{line}", index)
            index += 1


def _files(path: Path) -> list[Path]:
    works = ", ".join(SUFFIXES)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"folder {path} holds no file that can be read: put {works} files into it")
        return files
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: unknown suffix {path.suffix!r}: convert it to one of {works}")
    return [path]


def _read_file(path: Path, asked: Sequence[str], whole_text: bool) -> Iterator[tuple[dict[str, Any], int]]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        lines = _lines(path)
        if whole_text:
            text = "".join(line for line, _ in lines)
            return iter([({"text": text}, 1)])
        return (({"text": line.rstrip("\r\n")}, number) for line, number in lines)
    if suffix == ".jsonl":
        return _read_jsonl(path)
    return _read_table(path, asked, delimiter="\t" if suffix == ".tsv" else ",")


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """Yield decoded lines with their endings, and their numbers from 1."""
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                try:
                    yield raw.decode("utf-8-sig" if number == 1 else "utf-8"), number
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: byte {error.start} of the line is not UTF-8: save the file as UTF-8"
                    ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from error


def _read_jsonl(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    for line, number in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not valid JSON ({error}): correct or remove the line") from error
        if not isinstance(values, dict):
            raise DataError(
                f'{path}:{number}: holds a {type(values).__name__}, not an object: write {{"text": ...}} a line'
            )
        yield values, number


def _read_table(path: Path, asked: Sequence[str], delimiter: str) -> Iterator[tuple[dict[str, Any], int]]:
    # Quotes in .tsv files (MRPC, GLUE) are plain characters, often unbalanced. In .csv an unbalanced quote would
    # swallow the rows after it in silence, hence strict.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(
        (line for line, _ in _lines(path)), delimiter=delimiter, quoting=quoting, strict=delimiter == ","
    )
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells if _is_header(cells, asked) else []
                if header:
                    continue
            if header and len(cells) > len(header):
                raise DataError(
                    f"{path}:{line}: {len(cells)} cells under {len(header)} columns ({', '.join(header)}): "
                    "quote or remove the surplus separator"
                )
            names: Iterable[str] = header or map(str, range(len(cells)))
            yield dict(zip(names, cells, strict=False)), line
    except csv.Error as error:
        raise DataError(
            f"{path}:{start}: not valid CSV ({error}): double the quotes inside cells, or convert to .jsonl"
        ) from error


def _is_header(cells: list[str], asked: Sequence[str]) -> bool:
    """Whether the first row of a table is a header.

    It is one if it holds a column that the user named. If the user named columns by number, only a row of nothing but
    numbers that holds them is a header: a first row of data may well hold the label 1. Otherwise it is one unless a
    cell is empty, repeated or a number.
    """
    if asked and all(name.isdigit() for name in asked):
        return all(name in cells for name in asked) and all(cell.isdigit() for cell in cells)
    if any(name in cells for name in asked):
        return True
    return len(set(cells)) == len(cells) and all(cell.strip() and not is_number(cell) for cell in cells)


def is_number(value: Any) -> bool:
    """Whether a cell holds a number, or text that spells one."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
