"""Statistics of all sites, gathered one segment at a time: each window is complete when it is yielded.

Windows come in the order of the run: forwards where inputs are enough, backwards where output gradients are
needed. A caller that keeps what it makes of each window can stop at any time and resume later: it names the windows
that it has, and a store that kept the hidden states between two steps saves running the steps before again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eckart.calibration.layerwise.blocks import BlockSchedule, LayerwiseError
from eckart.calibration.layerwise.runner import LayerwiseRunner
from eckart.moments import Gatherer, Moments, needs_backward, statistics_named

Groups = dict[str, tuple[str, ...]]
"""Leader -> members, leader included: sites that share an input."""

ShowProgress = Callable[[Sequence[int], str], Iterable[int]]
"""(steps, caption) -> the steps, with a progress bar."""


@dataclass(frozen=True)
class StatisticsWindow:
    """Some sites whose statistics are complete.

    Attributes:
        name: unique, and the same in every run of the same model.
        groups: of these sites.
        moments: site -> statistics; sites that no token reached are there with a count of 0.
    """

    name: str
    groups: Groups
    moments: dict[str, Moments]


def split_by_segment(groups: Mapping[str, Sequence[str]], schedule: BlockSchedule) -> Groups:
    """Groups whose members are all called in the same segments; those that are never called are left out."""
    parts: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for leader, members in groups.items():
        for name in members:
            if name in schedule.segments:
                parts.setdefault((leader, schedule.segments[name]), []).append(name)
    return {members[0]: tuple(members) for members in parts.values()}


def groups_to_gather(
    groups: Mapping[str, Sequence[str]], schedule: BlockSchedule, needs: frozenset[str], done: Collection[str]
) -> Groups:
    """Groups as they are gathered block by block, without those whose windows are done.

    Args:
        groups: leader -> members.
        schedule: of the model.
        needs: names of statistics.
        done: names of windows.
    """
    parts = split_by_segment(groups, schedule)
    return {
        leader: members
        for leader, members in parts.items()
        if _window_name(_completing_segment(leader, schedule, needs)) not in done
    }


def gather_layerwise(
    runner: LayerwiseRunner,
    groups: Mapping[str, Sequence[str]],
    *,
    needs: frozenset[str],
    common: Mapping[str, frozenset[int]],
    done: Collection[str] = (),
    always: bool = False,
    show: ShowProgress = lambda steps, _: steps,
) -> Iterator[StatisticsWindow]:
    """Run through all blocks and gather.

    Args:
        runner: before its first step.
        groups: leader -> members; those that are called in several segments are split.
        needs: as for :func:`eckart.moments.gather`.
        common: as for :func:`eckart.moments.gather`.
        done: names of windows that the caller has.
        always: run to the end even if there is nothing to gather.
        show: shows progress over steps.

    Yields:
        Windows that are not done. What was kept for a window is dropped when the next one is asked for.

    Raises:
        LayerwiseError: a module is called in several segments, and a statistic is asked for that needs all its calls
            together, such as squared gradients of its weight.
    """
    several = [leader for leader in split_by_segment(groups, runner.schedule) if _times(leader, runner) > 1]
    whole = [name for name, kind in statistics_named(needs).items() if not kind.in_pieces]
    if several and whole:
        raise LayerwiseError(f"{several[0]} is called by several blocks, and {whole[0]} needs all its calls together")
    todo = groups_to_gather(groups, runner.schedule, needs, done)
    run = _LayerwiseGathering(runner, todo, needs, common, always, show)
    return run.backwards() if needs_backward(needs) else run.forwards()


def _times(leader: str, runner: LayerwiseRunner) -> int:
    return len(runner.schedule.segments[leader])


class _LayerwiseGathering:
    def __init__(
        self,
        runner: LayerwiseRunner,
        todo: Groups,
        needs: frozenset[str],
        common: Mapping[str, frozenset[int]],
        always: bool,
        show: ShowProgress,
    ) -> None:
        self.runner = runner
        self.todo = todo
        self.needs = needs
        self.common = common
        self.always = always
        self.show = show
        self.incomplete: dict[str, Moments] = {}
        self.max_rows: int | None = None  # that memory holds, once it ran out
        self.segments = {leader: runner.schedule.segments[leader] for leader in todo}
        self.completing = {leader: _completing_segment(leader, runner.schedule, needs) for leader in todo}

    def forwards(self) -> Iterator[StatisticsWindow]:
        if not self.todo:
            return
        runner, tail = self.runner, self.runner.schedule.tail
        first = min(min(self.segments[leader]) for leader in self.todo)
        start = first if first == 0 or runner.can_resume_after(first - 1) else 0
        stop = max(self.completing[leader] for leader in self.todo)
        for step in self.show(range(start, stop + 1), "calibrating"):
            self._run(step, runner.run_tail if step == tail else _of_step(runner.run_block, step))
            yield from self._complete(step)
            runner.drop_stream(step - 1)
        runner.drop_all()

    def backwards(self) -> Iterator[StatisticsWindow]:
        if not self.todo and not self.always:
            return
        runner, tail = self.runner, self.runner.schedule.tail
        top = max((max(self.segments[leader]) for leader in self.todo), default=tail)
        stop = min((self.completing[leader] for leader in self.todo), default=0)
        from_tail = top == tail or not runner.has_gradients(top + 1)
        start = tail if from_tail else top
        missing = next((step for step in range(start) if not runner.can_resume_after(step)), start)
        for step in self.show(range(missing, start), "running forwards"):
            self._run(step, _of_step(runner.run_block, step), gathering=False)
        if from_tail:
            self._run(tail, _tail_backward(runner))
            yield from self._complete(tail)
            start = tail - 1
        for step in self.show(range(start, stop - 1, -1), "calibrating"):
            self._run(step, _of_step(runner.run_block_backward, step))
            yield from self._complete(step)
            runner.drop_gradients(step + 1)
            runner.drop_outputs(step)
        runner.drop_all()

    def _run(self, segment: int, run: Callable[[Any, Any], Any], *, gathering: bool = True) -> None:
        """All batches through a segment, with hooks on the sites that are called in it."""
        runner = self.runner
        here = {leader: m for leader, m in self.todo.items() if gathering and segment in self.segments[leader]}
        with Gatherer(runner.model, here, needs=self.needs, common=self.common, into=self.incomplete) as gatherer:
            gatherer.max_rows = self.max_rows

            def run_part(batch: Any) -> None:
                runner.split_batch(batch)  # a half, where the whole was too large
                run(batch, gatherer)

            with runner.resident(segment):
                runner.for_each_batch(lambda batch, number: gatherer.run_in_parts(batch, number, run_part))
            self.incomplete.update(gatherer.moments)
            self.max_rows = gatherer.max_rows

    def _complete(self, segment: int) -> Iterator[StatisticsWindow]:
        """The window of a segment, if there is one."""
        groups = {leader: m for leader, m in self.todo.items() if self.completing[leader] == segment}
        if not groups:
            return
        moments = {name: self.incomplete.pop(name) for members in groups.values() for name in members}
        examples = sum(len(batch.examples) for batch in self.runner.batches)
        for entry in moments.values():
            entry.sequences = examples  # each saw all of them, in one segment or in several
        yield StatisticsWindow(_window_name(segment), groups, moments)


def _completing_segment(leader: str, schedule: BlockSchedule, needs: frozenset[str]) -> int:
    """The segment after which the statistics of a group are complete."""
    return (min if needs_backward(needs) else max)(schedule.segments[leader])


def _of_step(method: Callable[..., Any], step: int) -> Callable[[Any, Any], Any]:
    return lambda batch, gatherer: method(step, batch, gatherer)


def _tail_backward(runner: LayerwiseRunner) -> Callable[[Any, Any], Any]:
    return lambda batch, gatherer: runner.run_tail(batch, gatherer, backward=True)


def _window_name(segment: int) -> str:
    return f"segment-{segment}"
