"""Walk two models block by block over the same data, holding one block's inputs at a time.

The parent model runs once per chain of blocks and shows how each block is called: which argument is the
stream, the output of the block before, and what else it is given (masks, rotary tables, encoder states).
After that only blocks run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

STREAM = object()
"""Stands in recorded arguments for the stream: the output of the block before."""


class Reached(Exception):  # noqa: N818 - a signal, not an error
    """Stops a forward pass at the module that was waited for."""


@dataclass
class Call:
    """How a block was called: its arguments, the stream replaced by :data:`STREAM`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, stream: Tensor) -> Any:
        """Call the block on a stream."""
        args = tuple(stream if value is STREAM else value for value in self.args)
        kwargs = {key: stream if value is STREAM else value for key, value in self.kwargs.items()}
        return block(*args, **kwargs)


def chains(names: Sequence[str], model: nn.Module) -> list[list[str]]:
    """The blocks that hold the named modules, chain by chain: items of the outermost ModuleLists."""
    found: dict[str, dict[str, None]] = {}
    for name in names:
        block = block_of(name, model)
        if block is not None:
            found.setdefault(block.rsplit(".", 1)[0], {})[block] = None
    result = []
    for parent in found:
        module = model.get_submodule(parent)
        assert isinstance(module, nn.ModuleList)
        result.append([f"{parent}.{i}" for i in range(len(module))])
    return result


def block_of(name: str, model: nn.Module) -> str | None:
    """The item of the outermost ModuleList that holds a module; None if there is no such list."""
    for match in re.finditer(r"\.(\d+)(?=\.|$)", name):
        if isinstance(model.get_submodule(name[: match.start()]), nn.ModuleList):
            return name[: match.end()]
    return None


def record(model: nn.Module, blocks: Sequence[str], run: Callable[[], Any]) -> tuple[list[Call], Tensor] | None:
    """One whole forward pass of the parent: how every block of a chain is called, and the first block's stream.

    Returns:
        The calls and the stream, or None if the blocks do not form a chain: one is called twice or never, or is
        not fed by the output of the one before.
    """
    calls: list[Call] = []
    first: list[Tensor] = []
    expected: list[Tensor] = []
    broken: list[str] = []

    def before(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(calls) != index:
                broken.append(blocks[index])
                raise Reached
            stream = _first_tensor(args, kwargs) if index == 0 else expected[-1]
            call = Call(
                tuple(STREAM if value is stream else value for value in args),
                {key: STREAM if value is stream else value for key, value in kwargs.items()},
            )
            if STREAM not in call.args and STREAM not in call.kwargs.values():
                broken.append(blocks[index])
                raise Reached
            if index == 0:
                first.append(stream)
            calls.append(call)

        return hook

    def after(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            expected[:] = [stream_of(output)]

        return hook

    handles = []
    for index, name in enumerate(blocks):
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(index), with_kwargs=True))
        handles.append(module.register_forward_hook(after(index)))
    try:
        run()
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if broken or len(calls) != len(blocks):
        return None
    return calls, first[0]


def input_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a module is given when `run` runs; the pass stops there.

    Raises:
        LookupError: if the module is not called.
    """
    got: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        got.append(args[0] if args else next(iter(kwargs.values())))
        raise Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except Reached:
        return got[0]
    finally:
        handle.remove()
    raise LookupError("the module was not called")


def stream_of(output: Any) -> Tensor:
    """The hidden states of a block's output: the output itself, or its first item."""
    return output if isinstance(output, Tensor) else output[0]


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    values: Iterator[Any] = iter((*args, kwargs.get("hidden_states"), *kwargs.values()))
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


@dataclass
class Walker:
    """One model on its way through a chain of blocks, with all batches side by side.

    Attributes:
        model: the model; its modules may be replaced while it is walked.
        blocks: names of the chain's blocks.
        calls: for each batch, how each block is called.
        streams: for each batch, what the next block is given.
    """

    model: nn.Module
    blocks: Sequence[str]
    calls: list[list[Call]]
    streams: list[Tensor]

    @classmethod
    def start(cls, model: nn.Module, blocks: Sequence[str], runs: Sequence[Callable[[], Any]]) -> Walker | None:
        """Stand before the first block, or None if the blocks are no chain.

        Args:
            model: the model.
            blocks: names of the blocks.
            runs: one a batch; each runs the model on it.
        """
        walker = cls(model, blocks, [], [])
        for run in runs:
            recorded = record(model, blocks, run)
            if recorded is None:
                return None
            walker.calls.append(recorded[0])
            walker.streams.append(recorded[1])
        return walker

    def inputs(self, index: int, name: str) -> Iterator[Tensor]:
        """What a module inside block `index` is given, batch by batch; a block runs only as far as that."""
        block, module = self.model.get_submodule(self.blocks[index]), self.model.get_submodule(name)
        for calls, stream in zip(self.calls, self.streams, strict=True):
            yield input_of(module, partial(calls[index].run, block, stream))

    def advance(self, index: int) -> None:
        """Run block `index` on all batches: its outputs are the next block's streams."""
        block = self.model.get_submodule(self.blocks[index])
        for i, calls in enumerate(self.calls):
            self.streams[i] = stream_of(calls[index].run(block, self.streams[i]))
