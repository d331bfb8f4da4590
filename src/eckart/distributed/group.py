"""The processes of a run, as one of them sees them.

With one process every method does nothing. Words between processes go over the CPU (gloo), so that one that waits
for hours burns nothing; tensors go where they live (gloo on the CPU, NCCL on a GPU).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from eckart.distributed import wire
from eckart.distributed.wire import Layout
from eckart.errors import EckartError

# Bytes below which tensors are summed together: each exchange costs about a millisecond, however little it carries.
SMALL = 2**17

T = TypeVar("T")


class OtherProcessError(EckartError):
    """Another process failed, and says so itself; this one only stops with it."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    All call :meth:`reduce`, :meth:`all_reduce`, :meth:`broadcast`, :meth:`barrier` and :meth:`agree` in the same order.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this is the process that plans, prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of `items`: every size-th, from its rank on."""
        return list(items[self.rank :: self.size])

    def assign(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Give every site an owner: the dearest first, each to the process with the least work so far.

        Args:
            costs: site -> how long it takes, in any unit; the same in all processes.

        Returns:
            Site -> rank, in the order of `costs`; the same in all processes.
        """
        loads = [(0.0, rank) for rank in range(self.size)]
        owners: dict[str, int] = {}
        for site in sorted(costs, key=lambda site: (-costs[site], site)):
            load, owners[site] = loads[0]
            heapq.heapreplace(loads, (load + costs[site], owners[site]))
        return {site: owners[site] for site in costs}

    def reduce(self, tensors: MutableMapping[str, Tensor], owner: int) -> None:
        """Sum tensors over the processes, in place, at their owner.

        The processes may hold different keys: one that lacks a key adds nothing, and an owner that lacks it gets it.

        Args:
            tensors: key -> sum; no storage twice. What the others hold afterwards is undefined.
            owner: who gets the sums.

        Raises:
            EckartError: if processes hold different shapes, dtypes or kinds of device under one key.
        """
        self._sum(tensors, (owner,), partial(dist.reduce, dst=owner))

    def all_reduce(self, tensors: MutableMapping[str, Tensor]) -> None:
        """Sum tensors over the processes, in place, for all of them; otherwise as :meth:`reduce`.

        Args:
            tensors: key -> sum; a key that only others hold is added.

        Raises:
            EckartError: as for :meth:`reduce`.
        """
        self._sum(tensors, range(self.size), dist.all_reduce)

    def send(self, value: Any, source: int, to: int = 0) -> Any:
        """Hand a value from one process to another; the rest need not call this.

        The receiver waits for the source, so what may fail there comes before, under :meth:`agree`.

        Args:
            value: tensors in dicts with string keys, lists and tuples, beside JSON values; read at the source alone.
            source: who has it.
            to: who gets it.

        Returns:
            The value at `to`, each tensor on the kind of device it came from; None elsewhere.
        """
        if source == to or self.rank not in (source, to):
            return value if self.rank == to else None
        if self.rank == to:
            received = partial(self._received, partial(dist.recv, src=source))
            length = int(received(("int64", [1], "cpu")))
            return wire.deserialize(wire.as_json(received(("uint8", [length], "cpu"))), received)
        tensors: list[Tensor] = []
        words = wire.as_bytes(wire.serialize(value, tensors))
        for tensor in (torch.tensor([len(words)]), words, *tensors):
            for piece in wire.raw_pieces(tensor):
                _in_touch(dist.send, piece, dst=to)
        return None

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Hand a value from one process to all.

        Args:
            value: as for :meth:`send`.
            source: who has it.

        Returns:
            The value, in all processes.
        """
        if self.size == 1:
            return value
        tensors: list[Tensor] = []
        words = self._meet("broadcast", wire.serialize(value, tensors) if self.rank == source else None)[source]
        pass_on = partial(dist.broadcast, src=source)
        if self.rank != source:
            return wire.deserialize(words, partial(self._received, pass_on))
        for tensor in tensors:
            for piece in wire.raw_pieces(tensor):
                _in_touch(pass_on, piece)
        return value

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            self._meet("barrier")

    def agree(self, error: BaseException | None) -> None:
        """Stop all processes if one failed: called by each after work of its own, with what went wrong there.

        Those that are at their next :meth:`reduce`, :meth:`all_reduce`, :meth:`broadcast` or :meth:`barrier` already
        stop there. Not for what went wrong in one of these: that has to end the process, so that the others notice.

        Args:
            error: what this process failed with, or None.

        Raises:
            BaseException: this process's own error, unchanged.
            OtherProcessError: if only others failed, naming them and what they said.
        """
        if self.size > 1:
            self._meet("agree", error=error)
        elif error is not None:
            raise error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work of each process's own, without a word between them, that all finish or none: see :meth:`agree`.

        Yields:
            Nothing. Ctrl-C stops this process at once, whatever the others do.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        self.agree(failed)

    def _sum(self, tensors: MutableMapping[str, Tensor], owners: Sequence[int], add: Callable[..., Any]) -> None:
        if self.size == 1:
            return
        held = {key: wire.layout_of(tensor) for key, tensor in tensors.items()}
        layouts = _agreed(self._meet(f"sum at {', '.join(map(str, owners))}", held))
        if self.rank in owners:
            for key in layouts.keys() - tensors.keys():
                tensors[key] = wire.empty(layouts[key], self.device).zero_()
        small: dict[tuple[str, str], list[str]] = {}
        for key, layout in layouts.items():
            if wire.size_of(layout) < SMALL:
                small.setdefault((layout[0], layout[2]), []).append(key)
            else:
                self._add_large(tensors.get(key), layout, add)
        for (dtype, kind), keys in small.items():
            lengths = [math.prod(layouts[key][1]) for key in keys]
            flat = wire.empty((dtype, [sum(lengths)], kind), self.device).zero_()
            parts = dict(zip(keys, flat.split(lengths), strict=True))
            mine = [key for key in keys if key in tensors]
            for key in mine:
                parts[key].copy_(tensors[key].detach().reshape(-1))
            _in_touch(add, flat)
            for key in mine:
                tensors[key].detach().copy_(parts[key].view(layouts[key][1]))

    def _add_large(self, tensor: Tensor | None, layout: Layout, add: Callable[..., Any]) -> None:
        """Sum one tensor without a copy of it; None where nothing was seen of it."""
        whole = None if tensor is None else tensor.detach().contiguous()
        for start, stop in wire.cuts(layout):
            if whole is None:
                _in_touch(add, wire.empty((layout[0], [stop - start], layout[2]), self.device).zero_())
            else:
                _in_touch(add, whole.view(-1)[start:stop])
        if tensor is not None and whole is not None and not tensor.is_contiguous():
            tensor.detach().copy_(whole)

    def _received(self, receive: Callable[..., Any], layout: Layout) -> Tensor:
        tensor = wire.empty(layout, self.device)
        for piece in wire.raw_pieces(tensor):
            _in_touch(receive, piece)
        return tensor

    def _meet(self, what: str, content: Any = None, error: BaseException | None = None) -> list[Any]:
        """Exchange words with all processes: what each came for, or that it failed.

        Args:
            what: what this process came for.
            content: JSON for all others.
            error: what this process failed with.

        Returns:
            The content of each process.

        Raises:
            BaseException: this process's own error.
            OtherProcessError: if another failed.
            EckartError: if the others came for something else: a mistake in the program.
        """
        mine = wire.as_bytes([what, content, None if error is None else _words(error)])
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        _in_touch(dist.all_gather, lengths, torch.tensor([len(mine)]))
        padded = torch.zeros(max(map(int, lengths)), dtype=torch.uint8)
        padded[: len(mine)] = mine
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        _in_touch(dist.all_gather, gathered, padded)
        words = [wire.as_json(entry[: int(length)]) for entry, length in zip(gathered, lengths, strict=True)]
        if error is not None:
            raise error
        failed = [f"process {rank} of {self.size} failed: {entry[2]}" for rank, entry in enumerate(words) if entry[2]]
        if failed:
            raise OtherProcessError("; ".join(failed))
        came_for = [entry[0] for entry in words]
        if len(set(came_for)) > 1:
            raise EckartError(f"the processes are out of step ({'; '.join(came_for)}). Report this with the command.")
        return [entry[1] for entry in words]


def _agreed(held: Sequence[Mapping[str, Layout]]) -> dict[str, Layout]:
    """Every key that some process holds, in an order of its own, with the layout that all have of it."""
    layouts: dict[str, Layout] = {}
    for rank, theirs in enumerate(held):
        for key, layout in theirs.items():
            if layouts.setdefault(key, layout) != layout:
                raise EckartError(
                    f"{key}: process {rank} holds {_named(layout)}, another {_named(layouts[key])}. "
                    "Start all processes with the same command, model and device."
                )
    return dict(sorted(layouts.items()))


def _named(layout: Layout) -> str:
    return f"{layout[0]} {tuple(layout[1])} on {layout[2]}"


def _words(error: BaseException) -> str:
    """What the other processes are told of an error; never empty."""
    if isinstance(error, EckartError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _in_touch(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a function of torch.distributed; a lost connection is an error that says what to look for.

    Raises:
        EckartError: if it failed.
    """
    try:
        function(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise OtherProcessError(
            f"lost touch with another process, which ended early ({error}). Its own message says why; "
            "mend that, and start all processes again."
        ) from error
