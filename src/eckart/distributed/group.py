"""The processes of a run, as one of them sees them.

With one process every method does nothing. JSON messages go over the CPU (gloo), so that a process that waits for hours
uses no GPU time; tensors are exchanged on the device that they are on (gloo on the CPU, NCCL on a GPU).
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
from eckart.errors import EckartError, OtherProcessError

# Tensors of fewer bytes are summed together in one exchange: each exchange costs about a millisecond.
SMALL = 2**17

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    All processes call :meth:`reduce`, :meth:`all_reduce`, :meth:`broadcast`, :meth:`barrier` and
    :meth:`raise_if_any_failed` in the same order.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        device: of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this is the process that plans, prints and writes."""
        return self.rank == 0

    def own_part(self, items: Sequence[T]) -> list[T]:
        """The items that this process works on: every `size`-th, starting at `rank`."""
        return list(items[self.rank :: self.size])

    def assign_owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Assign every site to a process: the most expensive first, each to the process with the least work so far.

        Args:
            costs: site -> expected time in any unit; the same in all processes.

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
        """Sum tensors over the processes, in place; one process gets the sums.

        The processes may hold different keys: one that lacks a key adds nothing, and an owner that lacks it gets it.

        Args:
            tensors: key -> partial sum; no two of them share storage. Undefined afterwards in all other processes.
            owner: rank of the process that gets the sums.

        Raises:
            EckartError: if processes hold different shapes, dtypes or kinds of device under one key.
        """
        self._sum(tensors, (owner,), partial(dist.reduce, dst=owner))

    def all_reduce(self, tensors: MutableMapping[str, Tensor]) -> None:
        """Sum tensors over the processes, in place, for all of them; otherwise as :meth:`reduce`.

        Args:
            tensors: key -> partial sum; a key that only others hold is added.

        Raises:
            EckartError: as for :meth:`reduce`.
        """
        self._sum(tensors, range(self.size), dist.all_reduce)

    def send(self, value: Any, source: int, to: int = 0) -> Any:
        """Send a value from one process to another; the others need not call this.

        The receiver waits for the source, so work that may fail there is done before, inside
        :meth:`failing_together`.

        Args:
            value: tensors and JSON values in dicts with string keys, lists and tuples; read at the source only.
            source: rank of the sender.
            to: rank of the receiver.

        Returns:
            The value at `to`, each tensor on the kind of device it came from; None in other processes.
        """
        if source == to or self.rank not in (source, to):
            return value if self.rank == to else None
        if self.rank == to:
            received = partial(self._received, partial(dist.recv, src=source))
            length = int(received(("int64", [1], "cpu")))
            return wire.deserialize(wire.as_json(received(("uint8", [length], "cpu"))), received)
        tensors: list[Tensor] = []
        message = wire.as_bytes(wire.serialize(value, tensors))
        for tensor in (torch.tensor([len(message)]), message, *tensors):
            for piece in wire.raw_pieces(tensor):
                _communicate(dist.send, piece, dst=to)
        return None

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Send a value from one process to all.

        Args:
            value: as for :meth:`send`.
            source: rank of the sender.

        Returns:
            The value, in all processes.
        """
        if self.size == 1:
            return value
        tensors: list[Tensor] = []
        message = self._exchange("broadcast", wire.serialize(value, tensors) if self.rank == source else None)[source]
        pass_on = partial(dist.broadcast, src=source)
        if self.rank != source:
            return wire.deserialize(message, partial(self._received, pass_on))
        for tensor in tensors:
            for piece in wire.raw_pieces(tensor):
                _communicate(pass_on, piece)
        return value

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            self._exchange("barrier")

    def raise_if_any_failed(self, error: BaseException | None) -> None:
        """Stop all processes if one failed: each calls this after work of its own, with the error of that work.

        Processes that have reached their next :meth:`reduce`, :meth:`all_reduce`, :meth:`broadcast` or :meth:`barrier`
        stop there. An error inside one of these is not passed on here: it has to end the process, so that the others
        notice.

        Args:
            error: of this process, or None.

        Raises:
            BaseException: this process's own error, unchanged.
            OtherProcessError: if only others failed; the message holds their ranks and messages.
        """
        if self.size > 1:
            self._exchange("raise_if_any_failed", error=error)
        elif error is not None:
            raise error

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Run work without communication in each process; all stop if it fails in one (:meth:`raise_if_any_failed`).

        Yields:
            Nothing. Ctrl-C stops this process at once, without waiting for the others.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        self.raise_if_any_failed(failed)

    def _sum(self, tensors: MutableMapping[str, Tensor], owners: Sequence[int], add: Callable[..., Any]) -> None:
        if self.size == 1:
            return
        held = {key: wire.layout_of(tensor) for key, tensor in tensors.items()}
        layouts = _agreed(self._exchange(f"sum at {', '.join(map(str, owners))}", held))
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
            _communicate(add, flat)
            for key in mine:
                tensors[key].detach().copy_(parts[key].view(layouts[key][1]))

    def _add_large(self, tensor: Tensor | None, layout: Layout, add: Callable[..., Any]) -> None:
        """Sum one tensor piece by piece, without a copy of it; None adds zeros."""
        whole = None if tensor is None else tensor.detach().contiguous()
        for start, stop in wire.piece_bounds(layout):
            if whole is None:
                _communicate(add, wire.empty((layout[0], [stop - start], layout[2]), self.device).zero_())
            else:
                _communicate(add, whole.view(-1)[start:stop])
        if tensor is not None and whole is not None and not tensor.is_contiguous():
            tensor.detach().copy_(whole)

    def _received(self, receive: Callable[..., Any], layout: Layout) -> Tensor:
        tensor = wire.empty(layout, self.device)
        for piece in wire.raw_pieces(tensor):
            _communicate(receive, piece)
        return tensor

    def _exchange(self, what: str, content: Any = None, error: BaseException | None = None) -> list[Any]:
        """Exchange a JSON message with all processes: the operation that each has reached, or its error.

        Args:
            what: the operation.
            content: JSON for all others.
            error: of this process, or None.

        Returns:
            The content of each process.

        Raises:
            BaseException: this process's own error.
            OtherProcessError: if another failed.
            EckartError: if another has reached a different operation: a mistake in the program.
        """
        mine = wire.as_bytes([what, content, None if error is None else _message(error)])
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        _communicate(dist.all_gather, lengths, torch.tensor([len(mine)]))
        padded = torch.zeros(max(map(int, lengths)), dtype=torch.uint8)
        padded[: len(mine)] = mine
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        _communicate(dist.all_gather, gathered, padded)
        messages = [wire.as_json(entry[: int(length)]) for entry, length in zip(gathered, lengths, strict=True)]
        if error is not None:
            raise error
        failed = [
            f"process {rank} of {self.size} failed: {entry[2]}" for rank, entry in enumerate(messages) if entry[2]
        ]
        if failed:
            raise OtherProcessError("; ".join(failed))
        reached = [entry[0] for entry in messages]
        if len(set(reached)) > 1:
            raise EckartError(f"the processes are out of step ({'; '.join(reached)}). Report this with the command.")
        return [entry[1] for entry in messages]


def _agreed(held: Sequence[Mapping[str, Layout]]) -> dict[str, Layout]:
    """Every key that some process holds, sorted, with its layout.

    Raises:
        EckartError: if the processes hold different layouts under one key.
    """
    layouts: dict[str, Layout] = {}
    for rank, theirs in enumerate(held):
        for key, layout in theirs.items():
            if layouts.setdefault(key, layout) != layout:
                raise EckartError(
                    f"{key}: process {rank} holds {_describe(layout)}, another {_describe(layouts[key])}. "
                    "Start all processes with the same command, model and device."
                )
    return dict(sorted(layouts.items()))


def _describe(layout: Layout) -> str:
    return f"{layout[0]} {tuple(layout[1])} on {layout[2]}"


def _message(error: BaseException) -> str:
    """The text of an error for the other processes; never empty."""
    if isinstance(error, EckartError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _communicate(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a function of torch.distributed.

    Raises:
        OtherProcessError: if the connection was lost.
    """
    try:
        function(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise OtherProcessError(
            f"lost the connection to another process, which ended early ({error}). Its own message says why: "
            "correct that, and start all processes again."
        ) from error
