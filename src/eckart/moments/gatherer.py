"""Fill the accumulators from a model's own forward (and backward) passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from eckart.moments.accumulate import Fisher, Moments, SecondMoment
from eckart.moments.calls import argument
from eckart.moments.halving import is_out_of_memory, release
from eckart.moments.running import BatchLike, Running, Update

logger = logging.getLogger(__name__)

# Runs the model on a batch and returns the loss to differentiate; None: a forward pass is enough.
Step = Callable[[Any], Tensor | None]


class Gatherer:
    """Hooks that fill accumulators while a model runs; a context manager.

    Attributes:
        moments: site -> statistics; members of a group share one `inputs`.
        armed: while False the hooks do nothing.
        most: rows that are run at once, lowered when memory runs out; None: whole batches.
        halved: how often memory ran out.
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
            needs: any of "gram", "absolute", "gradients", "fisher".
            common: as :func:`common_calls` gives it; batches must then be of one example each.
            into: statistics to go on with; what is missing there is made new.
        """
        self.model = model
        self.groups = groups
        self.backward = bool(needs & {"gradients", "fisher"})
        self.moments = _moments(model, groups, needs, into or {})
        self.armed = True
        self.most: int | None = None
        self.halved = 0
        self._running = Running(common)
        self._rows = 0
        self._open = ExitStack()

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
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._running.forget()

    def begin(self, batch: BatchLike, number: int) -> None:
        """Say which batch runs next, and its number for errors."""
        self._running.begin(batch, number)
        self._rows = len(batch.examples)

    def finish(self) -> None:
        """End a batch: sum up modules that ran more than once, and count sequences."""
        running = self._running
        for name, calls in running.pending.items():  # their weight has ONE gradient a sequence
            inputs, gradients = (torch.cat(parts, dim=1) for parts in zip(*calls, strict=True))
            self._add_fisher(name, inputs, gradients)
        running.forget()
        for entry in self.moments.values():
            entry.sequences += self._rows

    def attempt(self, batch: BatchLike, number: int, run: Callable[[Any], Any]) -> None:
        """Begin, run and finish a batch; in halves, and halves of these, where memory runs out.

        What was added for the whole batch by then is not added again for its halves.

        Args:
            batch: what `run` is given, or parts of it.
            number: of the batch, for errors.
            run: runs the model, forward and, if gradients are needed, backward.

        Raises:
            Exception: what `run` raises, memory that does not hold a single row included.
        """
        most = min(self.most or len(batch.examples), len(batch.examples))
        waiting: list[tuple[BatchLike, frozenset[Update]]] = [(batch, frozenset())]
        while waiting:
            part, made = waiting.pop()
            size = len(part.examples)
            if size <= most:
                added = self._tried(part, number, run, made)
                if added is None:
                    continue
                made = added
                self.halved += 1
                most = self.most = size // 2
                release()
            middle = size // 2
            waiting += [(part.rows(middle, size), made), (part.rows(0, middle), made)]

    def _tried(
        self, part: BatchLike, number: int, run: Callable[[Any], Any], made: frozenset[Update]
    ) -> frozenset[Update] | None:
        """Run some rows; None if they went through, else the updates that are made for all of them."""
        self.begin(part, number)
        self._running.skipped = made
        try:
            run(part)
            self.finish()
        except Exception as error:
            size = len(part.examples)
            if size < 2 or not is_out_of_memory(error):
                raise
            if not self.halved:
                logger.warning("out of memory at %d examples: going on with half", size)
        else:
            return None
        added = made | self._running.made
        self._running.forget()
        return added

    def _input_hook(self, name: str) -> Callable[..., None]:
        key = f"input of {name}"
        moments, running = self.moments[name], self._running

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.armed:
                return
            call = running.call(key)
            if (key, call) in running.skipped:
                return
            rows = running.rows(argument(args, kwargs).detach(), running.is_common(name, call))
            moments.inputs.update(rows, f"{key}, batch {running.number}")
            running.made.add((key, call))

        return hook

    def _output_hook(self, name: str) -> Callable[..., Tensor | None]:
        key = f"output gradient of {name}"
        moments, running = self.moments[name], self._running

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not self.armed:
                return None
            call = running.call(key)
            common = running.is_common(name, call)
            squared = moments.fisher is not None and _fisher_of(name) not in running.skipped
            x = argument(args, kwargs).detach() if squared else None
            if not output.requires_grad:  # parameters are frozen: the graph starts at the first site
                # A clone, because some models change a projection's output in place, which no leaf allows.
                output = output.detach().requires_grad_().clone()

            def receive(gradient: Tensor) -> None:
                if not self.armed:
                    return
                if moments.gradients is not None and (key, call) not in running.skipped:
                    moments.gradients.update(running.rows(gradient, common), f"{key}, batch {running.number}")
                    running.made.add((key, call))
                if x is not None:
                    pair = running.by_sequence(x, common), running.by_sequence(gradient, common)
                    if running.calls[key] > 1:
                        running.pending.setdefault(name, []).append(pair)
                    else:
                        self._add_fisher(name, *pair)

            output.register_hook(receive)
            return output

        return hook

    def _add_fisher(self, name: str, inputs: Tensor, gradients: Tensor) -> None:
        fisher = self.moments[name].fisher
        assert fisher is not None
        fisher.update(inputs, gradients)
        self._running.made.add(_fisher_of(name))


def _fisher_of(name: str) -> Update:
    """One update a pass: the weight has one gradient a sequence, however often it is called."""
    return f"fisher of {name}", 0


def gather(
    model: nn.Module,
    groups: Mapping[str, Sequence[str]],
    batches: Iterable[BatchLike],
    step: Step,
    *,
    needs: frozenset[str],
    common: Mapping[str, frozenset[int]] | None = None,
) -> dict[str, Moments]:
    """Accumulate what the metrics need over all batches.

    Args:
        model: in eval mode; its parameters need no gradients.
        groups: leader -> members, as :func:`shared_inputs` gives them. One Gram serves a group.
        batches: with masks; padded tokens are never counted. One that does not fit in memory is run in halves.
        step: runs the model on a batch. Its loss is differentiated when gradients are needed.
        needs: any of "gram", "absolute", "gradients", "fisher".
        common: as :func:`common_calls` gives it; batches must then be of one example each.

    Returns:
        Site name -> moments. Members of a group share one `inputs` object.

    Raises:
        NumericalError: naming the site and batch of a value that is not finite.
    """
    with Gatherer(model, groups, needs=needs, common=common) as gatherer, torch.set_grad_enabled(gatherer.backward):

        def run(batch: Any) -> None:
            loss = step(batch)
            if gatherer.backward and loss is not None:
                loss.backward()

        for number, batch in enumerate(batches):
            gatherer.attempt(batch, number, run)
    return gatherer.moments


def _moments(
    model: nn.Module, groups: Mapping[str, Sequence[str]], needs: frozenset[str], into: Mapping[str, Moments]
) -> dict[str, Moments]:
    """An accumulator for every site: those of `into`, with what is missing there."""
    moments: dict[str, Moments] = {}
    for members in groups.values():
        widths = {name: _widths(model.get_submodule(name)) for name in members}
        there = next((into[name].inputs for name in members if name in into), None)
        inputs = there if there is not None else SecondMoment(widths[members[0]][0])
        if inputs.count == 0:
            inputs.with_gram, inputs.with_absolute = "gram" in needs, "absolute" in needs
        for name in members:
            entry = moments[name] = into[name] if name in into else Moments(inputs)
            if "gradients" in needs and entry.gradients is None:
                entry.gradients = SecondMoment(widths[name][1])
            if "fisher" in needs and entry.fisher is None:
                entry.fisher = Fisher()
    return moments


def _widths(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a Linear, or of a Conv1D, whose weight is (in, out)."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    rows, columns = module.weight.shape  # type: ignore[misc]
    return int(rows), int(columns)


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
