"""How the modules of a model are called: which share an input, and which are called on a common one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def shared_inputs(
    model: nn.Module, names: Sequence[str], run: Callable[[], Any], apart: Sequence[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Group modules that are called on one and the same tensor.

    Args:
        model: the model.
        names: modules to group.
        run: makes one small forward pass.
        apart: modules after each of which what was given before is let go of, so that the inputs of a deep model are
            not all kept; modules on both sides of one of these are never grouped.

    Returns:
        Leader -> all members, leader first, in order of the first call. Modules never called are absent.
    """
    calls: dict[str, list[tuple[Any, ...]]] = {}
    passed = [0]
    alive: list[Tensor] = []  # a freed tensor's address would be reused by another

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = argument(args, kwargs)
            alive.append(x)
            key = (passed[0], x.data_ptr(), x.storage_offset(), tuple(x.shape), x.stride(), x._version)
            calls.setdefault(name, []).append(key)

        return hook

    def leave(*_: Any) -> None:
        passed[0] += 1
        alive.clear()

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in names]
    handles += [model.get_submodule(name).register_forward_hook(leave) for name in apart]
    with hooked(handles):
        run()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, keys in calls.items():
        groups.setdefault(tuple(keys), []).append(name)
    return {members[0]: tuple(members) for members in groups.values()}


def common_calls(
    model: nn.Module, names: Sequence[str], one: Callable[[], Any], two: Callable[[], Any]
) -> dict[str, frozenset[int]]:
    """Find the calls on something that all examples of a batch have in common: a table of relative positions.

    Such an input comes once a batch, not once an example, and the gradient at its output is already summed over
    examples: its statistics depend on how the data are cut into batches, unless sequences run one at a time.

    Args:
        model: the model.
        names: modules to look at.
        one: makes a forward pass of one example.
        two: makes a forward pass of two examples of the same length.

    Returns:
        Module -> which of its calls, counted from 0. Modules without such a call are absent.
    """
    shapes: list[dict[str, list[tuple[int, ...]]]] = []
    for run in (one, two):
        seen: dict[str, list[tuple[int, ...]]] = {}

        def note(name: str, seen: dict[str, list[tuple[int, ...]]] = seen) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.setdefault(name, []).append(tuple(argument(args, kwargs).shape))

            return hook

        handles = [model.get_submodule(n).register_forward_pre_hook(note(n), with_kwargs=True) for n in names]
        with hooked(handles):
            run()
        shapes.append(seen)
    common = {}
    for name, first in shapes[0].items():
        pairs = zip(first, shapes[1].get(name, ()), strict=False)
        # Two axes are no sign: experts see as many tokens as happen to be sent to them.
        calls = frozenset(i for i, (a, b) in enumerate(pairs) if a == b and len(a) > 2)
        if calls:
            common[name] = calls
    return common


def argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module is called on."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks on leaving."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()
