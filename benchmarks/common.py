"""What the benchmarks share: interleaved timing and tables."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a slow moment of the machine hits all alike."""
    for function in functions.values():
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], output: Path | None = None) -> None:
    """Print a table, and write it as JSON where asked."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=140).print(table)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}\n")
    if output is not None:
        output.write_text(json.dumps({"title": title, "columns": list(columns), "rows": [list(r) for r in rows]}))
