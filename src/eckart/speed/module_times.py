"""Where the time of a forward pass goes: seconds of every module, without those of the modules inside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from eckart.forms import Factored
from eckart.speed.clock import Run

Mark = Any
"""A point in time: seconds on a CPU, an event of the device on a GPU."""


def time_modules(
    model: nn.Module,
    run: Run,
    *,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    mark: Callable[[], Mark] | None = None,
) -> dict[str, float]:
    """Seconds of every module in a forward pass, those of its children left out; together they are the whole pass.

    Hooks take the time when a module is entered and left. What lies between two marks belongs to the innermost module
    that is open. A factored module counts as one: a hook inside would change what it computes. On a GPU the marks are
    events in its queue, and the host waits once a pass.

    Args:
        model: in evaluation mode.
        run: a forward pass of it.
        repeats: passes; the medians are returned.
        device: where it computes.
        mark: takes the time; None for what the device has.

    Returns:
        Module name -> seconds; "" is the model itself. Modules that are not called are left out.
    """
    on_gpu = torch.device(device).type == "cuda"
    take = mark or (_event if on_gpu else time.perf_counter)
    found: dict[str, list[float]] = {}
    marks: list[tuple[str, bool, Mark]] = []
    with observed_modules(
        model,
        entered=lambda name, _: marks.append((name, True, take())),
        left=lambda name, _: marks.append((name, False, take())),
    ):
        for _ in range(repeats):
            marks.clear()
            run()
            if on_gpu:
                torch.cuda.synchronize(device)
            for name, seconds in own_seconds(marks).items():
                found.setdefault(name, []).append(seconds)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def own_seconds(marks: Sequence[tuple[str, bool, Mark]]) -> dict[str, float]:
    """Seconds by module, from marks in the order of time: (name, whether it was entered or left, when)."""
    seconds: dict[str, float] = {}
    open_modules: list[str] = []
    last: Mark = None
    for name, entered, now in marks:
        if open_modules:
            seconds[open_modules[-1]] = seconds.get(open_modules[-1], 0.0) + _between(last, now)
        if entered:
            open_modules.append(name)
        else:
            open_modules.pop()
        last = now
    return seconds


@contextmanager
def observed_modules(
    model: nn.Module, entered: Callable[[str, nn.Module], None], left: Callable[[str, nn.Module], None]
) -> Iterator[None]:
    """Call functions with the name of each module that is entered and left; nothing inside a factored one is seen."""
    handles = []
    for name, module in _outside_factored(model, ""):
        handles.append(module.register_forward_pre_hook(partial(_enter, entered, name)))
        handles.append(module.register_forward_hook(partial(_leave, left, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(function: Callable[[str, nn.Module], None], name: str, module: nn.Module, args: Any) -> None:
    function(name, module)


def _leave(function: Callable[[str, nn.Module], None], name: str, module: nn.Module, args: Any, output: Any) -> None:
    function(name, module)


def _outside_factored(module: nn.Module, name: str, seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules, each once by its first name."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    if not isinstance(module, Factored):
        for part, child in module.named_children():
            yield from _outside_factored(child, f"{name}.{part}" if name else part, seen)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Mark, second: Mark) -> float:
    return second - first if isinstance(first, float | int) else first.elapsed_time(second) / 1e3
