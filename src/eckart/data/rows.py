"""Rows of .txt, .jsonl, .csv and .tsv files, each with its file and line.

Read with Python's csv and json: `datasets` takes seconds to import, needs to be told whether a table has a header, and
does not say which line of a file is wrong.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from eckart.data.table import PEEK, BadRowError, column_names, find_separator, has_header, read_cells
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
    for file in list_files(path):
        for values, line in _read_file(file, asked, whole_text):
            yield DataRow(values, f"{file}:{line}", index)
            index += 1


def list_files(path: Path) -> list[Path]:
    """The file, or the readable files of a folder in sorted order.

    Raises:
        DataError: none of it can be read.
    """
    works = ", ".join(SUFFIXES)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"folder {path} holds no file that can be read: put {works} files into it")
        return files
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: unknown suffix {path.suffix!r}: convert it to one of {works}")
    require_regular(path)
    return [path]


def require_regular(path: Path) -> None:
    """Refuse what is no file on a disk: a pipe waits for its writer, a device such as /dev/zero never ends.

    Raises:
        DataError: naming it.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from error
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a device" if stat.S_ISCHR(mode) else "not a file on a disk"
        raise DataError(f"{path}: {kind}, which may have no end: write the text to a file, and name that")


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
    return _read_table(path, asked, "\t" if suffix == ".tsv" else ",")


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
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not valid JSON ({error}): correct or remove the line") from error
        if not isinstance(values, dict):
            raise DataError(
                f'{path}:{number}: holds a {type(values).__name__}, not an object: write {{"text": ...}} a line'
            )
        yield values, number


def _read_table(path: Path, asked: Sequence[str], usual: str) -> Iterator[tuple[dict[str, Any], int]]:
    lines = (line for line, _ in _lines(path))
    first_lines = list(islice(lines, PEEK))
    separator = find_separator(first_lines, usual)
    cells = read_cells(chain(first_lines, lines), separator)
    try:
        first = list(islice(cells, PEEK))
        if not first:
            return
        header = has_header([row for row, _ in first], asked, f"{path}:{first[0][1]}")
        width = len(first[0][0])
        names = [str(place) for place in range(width)]
        by_number = bool(asked) and all(name.isdigit() and name not in first[0][0] for name in asked)
        if header and not by_number:
            names = column_names(first[0][0], f"{path}:{first[0][1]}")
        for row, line in chain(first[header:], cells):
            if len(row) > width:
                raise DataError(
                    f"{path}:{line}: {len(row)} cells under {width} columns ({', '.join(names)}): "
                    "quote or remove the surplus separator"
                )
            yield dict(zip(names, row, strict=False)), line
    except BadRowError as error:
        raise DataError(
            f"{path}:{error.line}: not valid CSV ({error}): double the quotes inside cells, or convert to .jsonl"
        ) from error
