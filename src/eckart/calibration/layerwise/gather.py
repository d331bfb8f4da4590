"""Statistics of all sites, gathered one segment at a time: each window is complete when it comes.

Windows come in the order of the walk: forwards where inputs are enough, backwards where output gradients are
needed. A caller that keeps what it makes of each window can stop at any time and go on later: it names what it has,
and a store that kept what waited between two steps saves the walk from beginning anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eckart.calibration.layerwise.blocks import BlockSchedule, LayerwiseError
from eckart.calibration.layerwise.runner import LayerwiseRunner
from eckart.moments import Gatherer, Moments, needs_backward, statistics_named

Groups = dict[str, tuple[str, ...]]
Show = Callable[[Sequence[int], str], Iterable[int]]


@dataclass(frozen=True)
class StatisticsWindow:
    """Some sites whose statistics are complete.

    Attributes:
        name: unique, and the same in every run of the same model.
        groups: leader -> members, of these sites.
        moments: site -> statistics; sites that no token reached are there with a count of 0.
    """

    name: str
    groups: Groups
    moments: dict[str, Moments]


def split_by_segment(groups: Mapping[str, Sequence[str]], order: BlockSchedule) -> Groups:
    """Groups whose members are all called in the same segments; those that are never called are left out."""
    parts: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for leader, members in groups.items():
        for name in members:
            if name in order.segments:
                parts.setdefault((leader, order.segments[name]), []).append(name)
    return {members[0]: tuple(members) for members in parts.values()}


def not_done(
    groups: Mapping[str, Sequence[str]], order: BlockSchedule, needs: frozenset[str], done: Collection[str]
) -> Groups:
    """Groups as they are gathered on a walk, those left out whose windows are done.

    Args:
        groups: leader -> members.
        order: of the walk.
        needs: as for :func:`eckart.moments.gather`.
        done: names of windows.
    """
    parts = split_by_segment(groups, order)
    return {leader: m for leader, m in parts.items() if _name(_complete_at(leader, order, needs)) not in done}


def gather_layerwise(
    walk: LayerwiseRunner,
    groups: Mapping[str, Sequence[str]],
    *,
    needs: frozenset[str],
    common: Mapping[str, frozenset[int]],
    done: Collection[str] = (),
    always: bool = False,
    show: Show = lambda steps, _: steps,
) -> Iterator[StatisticsWindow]:
    """Walk through all blocks and gather.

    Args:
        walk: before its first step.
        groups: leader -> members; those that are called in several segments are split.
        needs: as for :func:`eckart.moments.gather`.
        common: as for :func:`eckart.moments.gather`.
        done: names of windows that the caller has.
        always: walk to the end even if there is nothing to gather.
        show: puts a progress bar, with a caption, over steps.

    Yields:
        Windows that are not done. What the walk kept for a window is dropped when the next one is asked for.

    Raises:
        UnwalkableError: a module is called in several segments, and its squared gradients are asked for: they are
            those of all its calls together.
    """
    parts = split_by_segment(groups, walk.order)
    several = [leader for leader in parts if len(walk.order.segments[leader]) > 1]
    if several and not all(kind.in_pieces for kind in statistics_named(needs).values()):
        raise LayerwiseError(f"{several[0]} is called by several blocks, and its squared gradients come in one piece")
    gather = _Gather(walk, not_done(groups, walk.order, needs, done), needs, common, always, show)
    return gather.backwards() if needs_backward(needs) else gather.forwards()


class _Gather:
    def __init__(
        self,
        walk: LayerwiseRunner,
        groups: Groups,
        needs: frozenset[str],
        common: Mapping[str, frozenset[int]],
        always: bool,
        show: Show,
    ) -> None:
        self.walk = walk
        self.needs = needs
        self.common = common
        self.always = always
        self.show = show
        self.open: dict[str, Moments] = {}
        self.most: int | None = None  # rows that memory holds, once it ran out
        self.todo = groups
        self.segments = {leader: walk.order.segments[leader] for leader in groups}
        self.complete_at = {leader: _complete_at(leader, walk.order, needs) for leader in groups}

    def forwards(self) -> Iterator[StatisticsWindow]:
        if not self.todo:
            return
        walk, tail = self.walk, self.walk.order.tail
        first = min(min(self.segments[leader]) for leader in self.todo)
        start = first if first == 0 or walk.waits_at(first - 1) else 0
        stop = max(self.complete_at[leader] for leader in self.todo)
        for step in self.show(range(start, stop + 1), "calibrating"):
            self._run(step, walk.finish if step == tail else _at(walk.forward, step))
            yield from self._complete(step)
            walk.forget(step - 1)
        walk.forget_all()

    def backwards(self) -> Iterator[StatisticsWindow]:
        if not self.todo and not self.always:
            return
        walk, tail = self.walk, self.walk.order.tail
        top = max((max(self.segments[leader]) for leader in self.todo), default=tail)
        stop = min((self.complete_at[leader] for leader in self.todo), default=0)
        from_tail = top == tail or not walk.gradients_wait_at(top + 1)
        start = tail if from_tail else top
        missing = next((step for step in range(start) if not walk.waits_at(step)), start)
        for step in self.show(range(missing, start), "running forwards"):
            self._run(step, _at(walk.forward, step), watching=False)
        if from_tail:
            self._run(tail, _finish_backward(walk))
            yield from self._complete(tail)
            start = tail - 1
        for step in self.show(range(start, stop - 1, -1), "calibrating"):
            self._run(step, _at(walk.backward, step))
            yield from self._complete(step)
            walk.forget_gradients(step + 1)
            walk.forget_step(step)
        walk.forget_all()

    def _run(self, segment: int, run: Callable[[Any, Any], Any], *, watching: bool = True) -> None:
        """All batches through a segment, with hooks on the sites that are called in it."""
        here = {leader: m for leader, m in self.todo.items() if watching and segment in self.segments[leader]}
        walk = self.walk
        with Gatherer(walk.model, here, needs=self.needs, common=self.common, into=self.open) as gatherer:
            gatherer.max_rows = self.most

            def part(batch: Any) -> None:
                walk.cut(batch)  # a half, where the whole was too large
                run(batch, gatherer)

            with walk.at(segment):
                walk.each(lambda batch, number: gatherer.run_in_parts(batch, number, part))
            self.open.update(gatherer.moments)
            self.most = gatherer.max_rows

    def _complete(self, segment: int) -> Iterator[StatisticsWindow]:
        """The window of a segment, if there is one."""
        groups = {leader: m for leader, m in self.todo.items() if self.complete_at[leader] == segment}
        if not groups:
            return
        moments = {name: self.open.pop(name) for members in groups.values() for name in members}
        examples = sum(len(batch.examples) for batch in self.walk.batches)
        for entry in moments.values():
            entry.sequences = examples  # each saw all of them, in one segment or in several
        yield StatisticsWindow(_name(segment), groups, moments)


def _complete_at(leader: str, order: BlockSchedule, needs: frozenset[str]) -> int:
    """The last segment on the walk in which a group is called."""
    return (min if needs_backward(needs) else max)(order.segments[leader])


def _at(method: Callable[..., Any], step: int) -> Callable[[Any, Any], Any]:
    return lambda batch, watch: method(step, batch, watch)


def _finish_backward(walk: LayerwiseRunner) -> Callable[[Any, Any], Any]:
    return lambda batch, watch: walk.finish(batch, watch, backward=True)


def _name(segment: int) -> str:
    return f"segment-{segment}"
