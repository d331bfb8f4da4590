"""Runs take turns: the order of calls, and what is made of the seconds, with a stopwatch that says what it is told."""

from typing import ClassVar

import pytest
import torch

from eckart.speed import clock
from eckart.speed.clock import Timing, measure_in_turn


class Watch:
    """Each call of run `name` takes `seconds[name]`; the first turn of each takes longer by `first`."""

    def __init__(self, seconds: dict[str, float], first: float = 0.0) -> None:
        self.seconds, self.first = seconds, first
        self.called: list[str] = []
        self.turns: list[tuple[str, int]] = []

    def run(self, name: str):
        return lambda: self.called.append(name)

    def __call__(self, run, calls: int) -> float:
        run()
        name = self.called.pop()
        late = self.first * (name not in dict(self.turns))
        self.turns.append((name, calls))
        return calls * (self.seconds[name] + late)

    def measure(self, **options) -> dict[str, Timing]:
        return measure_in_turn({name: self.run(name) for name in self.seconds}, stopwatch=self, **options)


def test_runs_take_turns_forth_and_back_after_the_warm_up():
    watch = Watch({"a": 1.0, "b": 2.0}, first=50.0)
    found = watch.measure(repeats=3, warm_up=4)
    assert watch.called == ["a"] * 4 + ["b"] * 4
    assert [name for name, _ in watch.turns] == [
        "a",
        "b",
        "a",
        "b",
        "b",
        "a",
        "a",
        "b",
    ]  # the first two are not counted
    assert found == {"a": Timing(1.0, 1.0, 1.0, 3), "b": Timing(2.0, 2.0, 2.0, 3)}


def test_turns_go_on_until_there_were_enough_seconds_in_the_mean():
    found = Watch({"a": 0.5, "b": 1.5}).measure(repeats=2, min_seconds=4.5)
    assert {timing.turns for timing in found.values()} == {5}  # 4 rounds of 2 seconds are not 9, 5 are


def test_a_short_run_on_a_gpu_is_called_many_times_a_turn(monkeypatch):
    watch = Watch({"short": 1e-4, "long": 1.0, "nothing": 0.0})
    monkeypatch.setattr(clock, "SHORTEST", {"cpu": 0.0, "cuda": 1e-2})
    found = watch.measure(repeats=1, device="cuda")
    assert watch.turns[:3] == [("short", 1), ("long", 1), ("nothing", 1)]
    assert watch.turns[3:] == [("short", 100), ("long", 1), ("nothing", clock.CALLS)]
    assert found["short"].median == pytest.approx(1e-4)


def test_quartiles():
    assert Timing.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Timing(3.0, 2.0, 4.0, 5)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)
    assert Timing(3.0, 2.0, 4.0, 5).as_dict() == {"median": 3.0, "lower": 2.0, "upper": 4.0, "turns": 5}


class Event:
    """A point in a queue that takes two milliseconds for each piece of work in it."""

    queue: ClassVar[list[str]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = len(self.queue)

    def synchronize(self) -> None:
        self.queue.append("waited")

    def elapsed_time(self, other: "Event") -> float:
        assert self.queue[-1] == "waited"
        return 2.0 * (other.at - self.at)


def test_the_clock_of_a_gpu_waits_once_a_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "queue", [])
    assert clock._take_cuda(lambda: Event.queue.append("work"), 3) == pytest.approx(6e-3)
    assert Event.queue == ["work"] * 3 + ["waited"]
    monkeypatch.setattr(Event, "queue", [])
    found = measure_in_turn({"a": lambda: Event.queue.append("work")}, repeats=1, warm_up=0, device="cuda")
    assert found["a"].median == pytest.approx(2e-3)


def test_plans_are_made_by_a_steady_clock(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert clock.steady_stopwatch("cpu") is clock.take_processor
    assert clock.steady_stopwatch("cuda") is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clock.steady_stopwatch("cpu") is None


def test_the_clock_of_the_processor_does_not_count_sleep(monkeypatch):
    passed = iter([10.0, 10.25])
    monkeypatch.setattr("time.process_time", lambda: next(passed))
    called = []
    assert clock.take_processor(lambda: called.append(1), 3) == 0.25
    assert called == [1] * 3


def test_the_clock_of_the_cpu_counts_every_call():
    called = []
    seconds = clock._take(lambda: called.append(torch.ones(4).sum()), 3)
    assert len(called) == 3
    assert seconds > 0
