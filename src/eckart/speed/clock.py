"""Seconds of several runs that take turns, so that a slow moment of the machine hits all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]
Stopwatch = Callable[[Run, int], float]
"""Seconds that calling a run so many times takes, until all its work is done."""

SHORTEST = {"cpu": 0.0, "cuda": 2e-3}
"""Seconds that one turn lasts at least, by kind of device: on a GPU one call may be shorter than its own launch."""

CALLS = 1000
"""The most calls in one turn."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: over all turns.
        lower: first quartile.
        upper: third quartile.
        turns: how many there were.
    """

    median: float
    lower: float
    upper: float
    turns: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarize the turns of one run; there is one at least."""
        lower, median, upper = statistics.quantiles(seconds, method="inclusive") if seconds[1:] else seconds * 3
        return cls(median, lower, upper, len(seconds))

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return {"median": self.median, "lower": self.lower, "upper": self.upper, "turns": self.turns}


def measure_in_turn(
    runs: Mapping[str, Run],
    *,
    repeats: int = 7,
    min_seconds: float = 0.0,
    warm_up: int = 2,
    device: torch.device | str = "cpu",
    stopwatch: Stopwatch | None = None,
) -> dict[str, Timing]:
    """Measure runs in turn, in this order and back, until there were enough turns and seconds.

    Work on a GPU is queued: a turn there is as many calls as last :data:`SHORTEST`, between two events of the device,
    and the host waits once at the end of the turn.

    Args:
        runs: name -> what is called; it must not wait for the device itself.
        repeats: turns of each run, at least.
        min_seconds: seconds that the runs are measured for, at least, in the mean of all.
        warm_up: calls of each before any is measured.
        device: where the runs compute.
        stopwatch: takes the time of a turn; None for the one of the device.

    Returns:
        Name -> seconds of one call.
    """
    kind = torch.device(device).type
    take = stopwatch or (_take_cuda if kind == "cuda" else _take)
    calls = {}
    for name, run in runs.items():
        for _ in range(warm_up):
            run()
        calls[name] = _calls_of_a_turn(take(run, 1), SHORTEST.get(kind, 0.0))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, turns, spent = list(runs), 0, 0.0
    while turns < repeats or spent < min_seconds * len(runs):
        for name in order:
            turn = take(runs[name], calls[name])
            seconds[name].append(turn / calls[name])
            spent += turn
        order.reverse()  # none always follows the same one
        turns += 1
    return {name: Timing.of(values) for name, values in seconds.items()}


def steady_stopwatch(device: torch.device | str) -> Stopwatch | None:
    """For plans, which compare what was timed at different moments: one thread of a CPU by what the processor works.

    None, the device's own clock, for several threads and other devices.
    """
    one_thread = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    return take_processor if one_thread else None


def _calls_of_a_turn(once: float, shortest: float) -> int:
    return min(CALLS, max(1, math.ceil(shortest / max(once, 1e-9))))


def _take(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def take_processor(run: Run, calls: int) -> float:
    """Seconds that the processor works for this process: of one thread, what others on a busy machine do not add to."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return time.process_time() - start


def _take_cuda(run: Run, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
