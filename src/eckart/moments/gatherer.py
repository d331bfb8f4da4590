"""Fill statistics from a model's own forward (and backward) passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import NumericalError, is_out_of_memory
from eckart.moments.calls import argument
from eckart.moments.current_batch import BatchLike, CurrentBatch, Update
from eckart.moments.halving import release
from eckart.moments.site import Moments
from eckart.moments.statistic import GradientStatistic, InputStatistic, SequenceStatistic, Statistic, needs_backward

logger = logging.getLogger(__name__)

# Runs the model on a batch and returns the loss to differentiate; None: a forward pass is enough.
Step = Callable[[Any], Tensor | None]


class Gatherer:
    """Hooks that fill statistics while a model runs; a context manager.

    Attributes:
        moments: site -> statistics; members of a group share those of their input.
        paused: while True the hooks do nothing.
        max_rows: rows that are run at once, lowered when memory runs out; None: whole batches.
        times_halved: how often memory ran out.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, Sequence[str]],
        *,
        needs: frozenset[str],
        common: Mapping[str, frozenset[int]] | None = None,
        into: Mapping[str, Moments] | None = None,
    ) -> None:
        """Prepare; the hooks are there from entering to leaving.

        Args:
            model: in eval mode; its parameters need no gradients.
            groups: leader -> members, as :func:`shared_inputs` gives them. One Gram serves a group.
            needs: names of statistics.
            common: as :func:`common_calls` gives it; batches must then be of one example each.
            into: statistics to add to; what is missing there is made new.
        """
        self.model = model
        self.groups = groups
        self.backward = needs_backward(needs)
        self.moments = _moments(groups, needs, into or {})
        self.paused = False
        self.max_rows: int | None = None
        self.times_halved = 0
        self._current = CurrentBatch(common)
        self._unchecked: list[tuple[str, Tensor]] = []  # what was added, and whether it was finite
        self._rows = 0
        self._hooks = ExitStack()

    def __enter__(self) -> Gatherer:
        with ExitStack() as opening:
            opening.enter_context(_frozen(self.model))
            for leader, members in self.groups.items():
                module = self.model.get_submodule(leader)
                hook = module.register_forward_pre_hook(self._input_hook(leader), with_kwargs=True)
                opening.callback(hook.remove)
                for name in members if self.backward else ():
                    module = self.model.get_submodule(name)
                    hook = module.register_forward_hook(self._output_hook(name), with_kwargs=True)
                    opening.callback(hook.remove)
            self._hooks = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._current.reset()

    def start(self, batch: BatchLike, number: int) -> None:
        """Say which batch runs next, and its number for errors."""
        self._current.start(batch, number)
        self._rows = len(batch.examples)

    def finish(self) -> None:
        """End a batch: add modules that ran more than once, and count sequences.

        Raises:
            NumericalError: something that was added was not finite, which makes the sums useless.
        """
        self._require_finite()
        current = self._current
        for site, calls in current.pieces.items():
            inputs, gradients = (torch.cat(parts, dim=1) for parts in zip(*calls, strict=True))
            self._add_sequences(site, inputs, gradients)
        current.reset()
        for entry in self.moments.values():
            entry.sequences += self._rows

    def run_in_parts(self, batch: BatchLike, number: int, run: Callable[[Any], Any]) -> None:
        """Start, run and finish a batch; in halves, and halves of these, where memory runs out.

        What was added for the whole batch by then is not added again for its halves.

        Args:
            batch: what `run` is given, or parts of it.
            number: of the batch, for errors.
            run: runs the model, forward and, if gradients are needed, backward.

        Raises:
            Exception: what `run` raises, memory that does not hold a single row included.
        """
        max_rows = min(self.max_rows or len(batch.examples), len(batch.examples))
        todo: list[tuple[BatchLike, frozenset[Update]]] = [(batch, frozenset())]
        while todo:
            part, added_before = todo.pop()
            size = len(part.examples)
            if size <= max_rows:
                added = self._try(part, number, run, added_before)
                if added is None:
                    continue
                added_before = added
                self.times_halved += 1
                max_rows = self.max_rows = size // 2
                release()
            middle = size // 2
            todo += [(part.rows(middle, size), added_before), (part.rows(0, middle), added_before)]

    def _try(
        self, part: BatchLike, number: int, run: Callable[[Any], Any], added_before: frozenset[Update]
    ) -> frozenset[Update] | None:
        """Run some rows; None if memory held them, else the updates that are made for all of them."""
        self.start(part, number)
        self._current.added_before = added_before
        try:
            run(part)
            self.finish()
        except NumericalError:  # of a loss, say: a site whose input is to blame is named first
            self._require_finite()
            raise
        except Exception as error:
            size = len(part.examples)
            if size < 2 or not is_out_of_memory(error):
                raise
            if not self.times_halved:
                logger.warning("out of memory at %d examples: continuing with half", size)
        else:
            return None
        added = added_before | self._current.added
        self._current.reset()
        return added

    def _input_hook(self, site: str) -> Callable[..., None]:
        current = self._current
        statistics = _of_kind(self.moments[site], InputStatistic)
        where = f"input of {site}"

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.paused:
                return
            call = current.count_call(where)
            if todo := self._not_added(statistics, site, call):
                rows = current.real_tokens(argument(args, kwargs).detach(), current.is_common(site, call))
                self._add_rows(todo, rows, f"{where}, batch {current.number}")

        return hook

    def _output_hook(self, site: str) -> Callable[..., Tensor | None]:
        current = self._current
        by_token = _of_kind(self.moments[site], GradientStatistic)
        by_sequence = _of_kind(self.moments[site], SequenceStatistic)
        where = f"output gradient of {site}"

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if self.paused:
                return None
            call = current.count_call(where)
            common = current.is_common(site, call)
            x = argument(args, kwargs).detach() if self._not_added(by_sequence, site, 0) else None
            if not output.requires_grad:  # parameters are frozen: the graph starts at the first site
                # A clone, because some models change a projection's output in place, which no leaf allows.
                output = output.detach().requires_grad_().clone()

            def receive(gradient: Tensor) -> None:
                if self.paused:
                    return
                if todo := self._not_added(by_token, site, call):
                    rows = current.real_tokens(gradient, common)
                    self._add_rows(todo, rows, f"{where}, batch {current.number}")
                if x is not None:
                    pair = current.by_sequence(x, common), current.by_sequence(gradient, common)
                    if current.calls[where] > 1:
                        current.pieces.setdefault(site, []).append(pair)
                    else:
                        self._add_sequences(site, *pair)

            output.register_hook(receive)
            return output

        return hook

    def _not_added(self, statistics: Mapping[str, Any], site: str, call: int) -> dict[Update, Any]:
        """Those that a pass over more rows has not updated by this call before memory ran out."""
        updates = {(f"{name} of {site}", call): statistic for name, statistic in statistics.items()}
        return {update: found for update, found in updates.items() if update not in self._current.added_before}

    def _add_rows(self, todo: Mapping[Update, InputStatistic | GradientStatistic], rows: Tensor, where: str) -> None:
        rows = rows.detach().float()
        finite = rows.sum().isfinite()
        for update, statistic in todo.items():
            statistic.update(rows)
            self._current.added.add(update)
            if not self._unchecked or self._unchecked[-1][1] is not finite:
                self._unchecked.append((where, finite))

    def _require_finite(self) -> None:
        """Refuse NaN and infinity that were added, naming the first site: one look a batch, not one a site."""
        checks, self._unchecked = self._unchecked, []
        if checks and not bool(torch.stack([finite for _, finite in checks]).all()):
            where = next(where for where, finite in checks if not bool(finite))
            raise NumericalError(
                f"{where}: there are values that are NaN or infinite. "
                "Load the model in float32 or bfloat16 (float16 overflows), or look at this batch's text."
            )

    def _add_sequences(self, site: str, inputs: Tensor, gradients: Tensor) -> None:
        """One update a pass, however often the site is called: its weight has one gradient a sequence."""
        statistics = _of_kind(self.moments[site], SequenceStatistic)
        for update, statistic in self._not_added(statistics, site, 0).items():
            statistic.update(inputs, gradients)
            self._current.added.add(update)


def _of_kind(moments: Moments, kind: type[Statistic]) -> dict[str, Statistic]:
    return {name: found for name, found in moments.statistics.items() if isinstance(found, kind)}


def gather(
    model: nn.Module,
    groups: Mapping[str, Sequence[str]],
    batches: Iterable[BatchLike],
    step: Step,
    *,
    needs: frozenset[str],
    common: Mapping[str, frozenset[int]] | None = None,
) -> dict[str, Moments]:
    """Gather what the metrics need over all batches.

    Args:
        model: in eval mode; its parameters need no gradients.
        groups: leader -> members, as :func:`shared_inputs` gives them. One Gram serves a group.
        batches: with masks; padded tokens are never counted. One that does not fit in memory is run in halves.
        step: runs the model on a batch. Its loss is differentiated when gradients are needed.
        needs: names of statistics.
        common: as :func:`common_calls` gives it; batches must then be of one example each.

    Returns:
        Site name -> moments. Members of a group share the statistics of their input.

    Raises:
        NumericalError: naming the site and batch of a value that is not finite.
    """
    with Gatherer(model, groups, needs=needs, common=common) as gatherer, torch.set_grad_enabled(gatherer.backward):

        def run(batch: Any) -> None:
            loss = step(batch)
            if gatherer.backward and loss is not None:
                loss.backward()

        for number, batch in enumerate(batches):
            gatherer.run_in_parts(batch, number, run)
    return gatherer.moments


def _moments(
    groups: Mapping[str, Sequence[str]], needs: frozenset[str], into: Mapping[str, Moments]
) -> dict[str, Moments]:
    """The statistics of every site: those of `into`, with what is missing there."""
    moments: dict[str, Moments] = {}
    for members in groups.values():
        shared: dict[str, Statistic] = {}
        for name in members:
            shared = (into[name].shared if name in into else {}) | shared
        for name in members:
            empty = Moments.empty(needs, shared)
            moments[name] = into.get(name, empty)
            moments[name].statistics = empty.statistics | moments[name].own | shared
            shared = moments[name].shared
    return moments


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gathers a gradient; flags are put back afterwards."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
