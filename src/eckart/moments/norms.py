"""Which modules of a model are called on what a normalization put out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from eckart.moments.calls import argument, hooked

WORD = "norm"
"""In the name of every class of a normalization: LayerNorm, RMSNorm, T5LayerNorm, BatchNorm1d, ..."""


def reading_norms(
    model: nn.Module, names: Sequence[str], run: Callable[[], Any], apart: Sequence[str] = ()
) -> frozenset[str]:
    """Modules whose every input is the very tensor, or a reshaped one, that a normalization put out.

    Args:
        model: the model, in evaluation mode: a dropout between the two hands its input on.
        names: modules to look at.
        run: makes one small forward pass.
        apart: blocks. What a normalization inside one put out is let go of after the next one, so that the inputs of a
            deep model are not all kept.
    """
    inside = tuple(f"{block}." for block in apart)
    outside: list[Tensor] = []
    recent: list[list[Tensor]] = [[], []]  # of the block before, and of this one
    calls: dict[str, list[bool]] = {}

    def put_out(kept: Callable[[], list[Tensor]]) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                kept().append(output)

        return hook

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = argument(args, kwargs)
            known = (*outside, *recent[0], *recent[1])
            calls.setdefault(name, []).append(any(_same(x, other) for other in known))

        return hook

    def leave(*_: Any) -> None:
        recent.append([])
        recent.pop(0)

    handles = [
        module.register_forward_hook(put_out((lambda: recent[1]) if name.startswith(inside) else (lambda: outside)))
        for name, module in model.named_modules()
        if WORD in type(module).__name__.lower() and not module._modules  # whole models have it in theirs, too
    ]
    handles += [model.get_submodule(name).register_forward_pre_hook(look(name), with_kwargs=True) for name in names]
    handles += [model.get_submodule(block).register_forward_hook(leave) for block in apart]
    with hooked(handles):
        run()
    return frozenset(name for name, found in calls.items() if all(found))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are views of all of one tensor of the same width."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.shape[-1] == other.shape[-1]
