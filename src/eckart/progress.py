"""Bars over loops, and the outlook of a run: its stages, which of them runs, and how long the rest takes, about.

A stage's cost is known in passes of a model over a text, and what a pass takes is not known before one has run. The
outlook begins with a short timing, and learns from the stages that are done:

    seconds of a pass = seconds of the stages done / their passes

and no less than what the stage that runs has needed so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub.utils.tqdm import tqdm

T = TypeVar("T")

NAME = "eckart"
"""What these bars are known as to `huggingface_hub.utils.disable_progress_bars`."""

SURE = 0.05
"""The part of a loop that must be done before its rest is judged by it."""

PARTS = 1_000
"""Steps of the bar of a whole run."""

LONG = 180.0
"""Seconds after which whoever waits wants to know how to wait less."""

OVERALL = "{desc} |{bar}|"


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        name: a word or two.
        passes: what it costs, in passes of the original over the text.
        seconds: what it takes besides, whatever the text.
        turns: whether it takes turns with the stage after it.
    """

    name: str
    passes: float = 0.0
    seconds: float = 0.0
    turns: bool = False


class Outlook:
    """The stages of a run, in order, and where it is. As a context manager it shows a line with a bar on a terminal."""

    def __init__(
        self,
        stages: Sequence[Stage],
        report: Callable[[str], None],
        pass_seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        hint: str = "",
    ) -> None:
        """Begin before the first stage.

        Args:
            stages: of the run; their names differ.
            report: told about each stage.
            pass_seconds: what a pass takes, as a short timing says; None: not known before a stage is done.
            clock: seconds.
            hint: how less is done; said once, where the rest takes more than :data:`LONG`.
        """
        self.stages = list(stages)
        self.spent = [0.0] * len(self.stages)
        self.place = -1
        self.pass_seconds, self._report, self._clock = pass_seconds, report, clock
        self._since, self._hint = clock(), hint
        self._alternating = {p + more for p, stage in enumerate(self.stages) if stage.turns for more in (0, 1)}
        self._told: set[int] = set()
        self._loop: tuple[float, float] | None = None
        self._bar: Any = None

    def __enter__(self) -> Outlook:
        global _running
        if _running is None:  # of a run inside another the outer one is shown
            _running = self
            self._bar = tqdm(total=PARTS, leave=False, disable=None, name=NAME, bar_format=OVERALL)
        return self

    def __exit__(self, *error: object) -> None:
        global _running
        if error[0] is None:
            self._finish(len(self.stages))
        if _running is self:
            _running = None
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float | None:
        """How long the whole run takes, about, as far as is known now."""
        left = self.left
        return None if left is None else left + self._all_spent

    @property
    def left(self) -> float | None:
        """Seconds to the end, about; None as long as that is not known."""
        rate = self._rate()
        if rate is None:
            return None
        found = 0.0
        for place, stage in enumerate(self.stages):
            rest = max(0.0, stage.passes * rate + stage.seconds - self._spent(place))
            if place == self.place:
                found += max(rest, self._rest_of_loop())
            elif place > self.place or self._is_open(place):
                found += rest
        return found

    def enter(self, name: str) -> None:
        """Go on to a stage, or back to one; a name that no stage has belongs to the stage that runs."""
        found = next((place for place, stage in enumerate(self.stages) if stage.name == name), None)
        if found is None or found == self.place:
            return
        now = self._clock()
        if self.place >= 0:
            self.spent[self.place] += now - self._since
        if found < self.place:
            self._alternating |= set(range(found, self.place + 1))
        self._since, self.place, self._loop = now, found, None
        self._finish(min(found, *self._alternating) if self._is_open(found) else found)
        if found not in self._told and (self._bar is None or self._bar.disable):
            self._report(self.describe())
        self._told.add(found)
        self.draw()

    def describe(self) -> str:
        """Which stage runs, and how long the rest takes."""
        left = self.left
        words = f"stage {self.place + 1} of {len(self.stages)}: {self.stages[self.place].name}"
        if left is None:
            return words
        hint, self._hint = (f" ({self._hint})", "") if self._hint and left > LONG else ("", self._hint)
        return f"{words}; {describe_seconds(left)} left{hint}"

    def follow(self, done: float, total: float | None, seconds: float) -> None:
        """Be told how far a loop of the stage is, and how long it has run."""
        if total:
            self._loop = (min(1.0, done / total), seconds)
        self.draw()

    def draw(self) -> None:
        """Show where the run is, on a terminal."""
        if self._bar is None or self._bar.disable or self.place < 0:
            return
        left, spent = self.left, self._all_spent
        words = f"stage {self.place + 1} of {len(self.stages)}"
        words += "" if left is None else f", {describe_seconds(left)} left"
        self._bar.set_description_str(words, refresh=False)
        self._bar.n = 0 if left is None else int(PARTS * spent / max(spent + left, 1e-9))
        self._bar.refresh()

    def _finish(self, end: int) -> None:
        """Leave a line of each stage that is over, where bars are shown, which leave none."""
        if self._bar is None or self._bar.disable:
            return
        for place in sorted(self._told):
            if place < end:
                seconds = self._spent(place)
                self._report(f"stage {place + 1} of {len(self.stages)}: {self.stages[place].name}, {seconds:.1f} s")
                self._told.discard(place)

    @property
    def _all_spent(self) -> float:
        return sum(map(self._spent, range(len(self.stages))))

    def _spent(self, place: int) -> float:
        return self.spent[place] + (self._clock() - self._since if place == self.place else 0.0)

    def _is_open(self, place: int) -> bool:
        """Whether a stage goes on, because it takes turns with the one that runs."""
        return place in self._alternating and self.place in self._alternating

    def _rest_of_loop(self) -> float:
        if self._loop is None or self._loop[0] < SURE:
            return 0.0
        done, seconds = self._loop
        return seconds * (1 - done) / done

    def _rate(self) -> float | None:
        """Seconds of a pass."""
        if not any(stage.passes for stage in self.stages):
            return 0.0
        running = [p for p in range(len(self.stages)) if p == self.place or self._is_open(p)]
        over = [place for place in range(max(0, self.place)) if place not in running]
        known = self._per_pass(over)
        known = self.pass_seconds if known is None else known
        now = self._per_pass(running)
        if now is None:
            return known
        if known is None:
            return now / self._loop[0] if self._loop is not None and self._loop[0] >= SURE else None
        return max(known, now)

    def _per_pass(self, places: Sequence[int]) -> float | None:
        passes = sum(self.stages[place].passes for place in places)
        if not passes:
            return None
        with_passes = [place for place in places if self.stages[place].passes]
        return sum(max(0.0, self._spent(place) - self.stages[place].seconds) for place in with_passes) / passes


_running: Outlook | None = None


class Bar(tqdm):
    """A bar of a loop; the outlook of the run that it belongs to follows it."""

    def display(self, *args: Any, **options: Any) -> Any:
        """Draw the bar, and then the line of the whole run."""
        shown = super().display(*args, **options)
        if _running is not None and not self.disable:
            _running.follow(self.n, self.total, self.format_dict["elapsed"])
        return shown


def show_bar(
    items: Iterable[T] | None = None, *, what: str, total: int | None = None, disable: bool | None = None, **more: Any
) -> Any:
    """A bar over a loop, or one that is moved by hand.

    Args:
        items: of the loop.
        what: caption.
        total: number of items, if `items` has no length.
        disable: True for no bar, None for a bar on a terminal only.
        more: options of tqdm.
    """
    return Bar(items, desc=what, total=total, disable=disable, leave=False, name=NAME, **more)


def describe_seconds(seconds: float) -> str:
    """A time that is not known well, in words: "about 4 minutes"."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 55:
        return f"about {round(seconds / 10) * 10} seconds"
    minutes = round(seconds / 60)
    if minutes < 60:
        return "about a minute" if minutes <= 1 else f"about {minutes} minutes"
    hours = round(seconds / 1800) / 2
    return "about an hour" if hours <= 1 else f"about {hours:g} hours"


def describe_count(number: int, what: str) -> str:
    """So many of a thing: "4 runs"."""
    return f"{number:,} {what}{'s' * (number != 1)}"
