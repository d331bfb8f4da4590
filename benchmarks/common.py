"""What the benchmarks share: interleaved timing, commands that are watched while they run, and tables."""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

COMPRESS = (sys.executable, "-m", "eckart", "compress")
EVERY = 0.05
"""Seconds between two looks at the memory of a command."""


@dataclass(frozen=True)
class Ran:
    """How a command ended.

    Attributes:
        code: exit code; negative: the signal that ended it.
        seconds: from its start to its end.
        peak: most bytes seen in its memory and its children's that no file backs: mapped weights do not count.
        output: what it wrote, on stdout and stderr.
    """

    code: int
    seconds: float
    peak: int
    output: str

    @property
    def last_words(self) -> str:
        """The end of what it wrote."""
        return "\n".join(self.output.strip().splitlines()[-3:])


def watched(
    command: Sequence[Any],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    kill: Callable[[], bool] = lambda: False,
) -> Ran:
    """Run a command, follow its memory, and kill it once `kill()`, asked all the time, says so.

    When this process is interrupted or told to end, the command and its children are killed with it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = time.perf_counter()
    peak, looked = 0, start
    family: list[int] = []
    with log.open("wb") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                now = time.perf_counter()
                if kill():
                    process.kill()
                    break
                if not family or now - looked > 1:  # children are few and stay long
                    family, looked = _family(process.pid), now
                peak = max(peak, sum(map(_held, family)))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(EVERY)
            code = process.wait()
            seconds = time.perf_counter() - start
        finally:
            if process.poll() is None:
                for pid in reversed(_family(process.pid)):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
    return Ran(code, seconds, peak, log.read_text(encoding="utf-8", errors="replace"))


def _held(pid: int) -> int:
    """Bytes of a process in memory that no file backs; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            # The name, in parentheses, may hold anything.
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    family = [pid]
    for one in family:
        family += [child for child, parent in parents.items() if parent == one]
    return family


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as the result pages have them."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in (columns, *rows)]
    head, *body = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([head, f"|:--|{'--:|' * (len(columns) - 1)}", *body])


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


def variants_of_default() -> list[Any]:
    """The default method, and what each of its parts is worth."""
    from eckart.compression.effort import with_effort
    from eckart.methods import METHODS

    default = METHODS["eckart"]
    size = replace(default, name="eckart, --optimise size", form=default.smallest_form or default.form)
    return [
        replace(default, name="eckart, low-rank alone", form="lowrank", slices=False),
        replace(default, name="eckart, low-rank or joint", slices=False),
        replace(default, name="eckart without refit", refit=False),
        default,
        replace(default, name="eckart, pivoted alone", form="pivoted", slices=False),
        size,
        *(with_effort(replace(method, name=f"{method.name} --effort best"), "best") for method in (default, size)),
    ]
