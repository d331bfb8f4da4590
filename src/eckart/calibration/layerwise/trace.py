"""Whether walking a model gives what running it gives, tried on one example before the long work starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from eckart.calibration.layerwise.blocks import BlockSchedule, LayerwiseError, schedule_of
from eckart.calibration.layerwise.output import Structure
from eckart.calibration.layerwise.runner import HiddenStateStore, LayerwiseRunner
from eckart.moments import is_out_of_memory

# Both run the same operations on the same numbers; what differs beyond rounding was computed from something else.
TOLERANCE = 1e-4


def trace_blocks(
    model: nn.Module,
    names: Sequence[str],
    run: Callable[[Any], Any],
    example: Any,
    store: HiddenStateStore,
    *,
    backward: bool = False,
    **more: Any,
) -> tuple[BlockSchedule, dict[int, Structure]]:
    """Find the steps of a model, and walk one example through them.

    Args:
        model: in evaluation mode.
        names: modules whose segments are to be known.
        run: runs the model on a batch and returns its output.
        example: a batch of one row.
        store: where tensors wait meanwhile.
        backward: whether it will be walked backwards too. Then the output of a named module between two blocks may be
            read by the next block alone: the gradient at it comes in one piece.
        **more: `held` and `device` of :class:`LayerwiseRunner`.

    Returns:
        The steps, and what each puts out.

    Raises:
        UnwalkableError: there are no blocks, or the walk's output is not the model's; the text says why.
    """
    with torch.no_grad():
        plain: list[Any] = []
        order = schedule_of(model, names, lambda: plain.append(run(example)))
        walk = LayerwiseRunner(model, order, run, [example], store, name="check", **more)
        handles = _poisoned(walk) if backward else []
        try:
            for step in range(order.tail):
                with walk.at(step):
                    walk.forward(step, example)
                walk.forget(step - 1)
            walked = walk.finish(example)
        except LayerwiseError:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            # Whatever a model's own code makes of a stand-in.
            raise LayerwiseError(f"with stand-ins for its blocks it fails: {type(error).__name__}: {error}") from error
        finally:
            for handle in handles:
                handle.remove()
            walk.forget_all()
    _compare(plain[0], walked)
    return order, walk.structures


def _poisoned(walk: LayerwiseRunner) -> list[Any]:
    """Modules between blocks put out NaN in all passes but their own segment's: who reads it then is found out."""

    def spoil(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            later = walk.segment > max(walk.order.segments[name])
            return torch.full_like(output, float("nan")) if later and isinstance(output, Tensor) else output

        return hook

    return [walk.model.get_submodule(name).register_forward_hook(spoil(name)) for name in walk.order.between]


def _compare(plain: Any, walked: Any) -> None:
    pairs = zip(pytree.tree_leaves(plain), pytree.tree_leaves(walked), strict=False)
    compared = 0
    for expected, found in pairs:
        if not isinstance(expected, Tensor) or not expected.is_floating_point():
            continue
        compared += 1
        if found.shape != expected.shape:
            raise LayerwiseError(f"walked, it puts out {tuple(found.shape)} instead of {tuple(expected.shape)}")
        finite = torch.isfinite(expected)  # a logit may be minus infinity
        if not bool((torch.isfinite(found) == finite).all()):
            raise LayerwiseError("walked, other numbers of its output are finite")
        scale = expected[finite].abs().amax() if finite.any() else expected.new_zeros(())
        off = (found - expected)[finite].abs().amax() if finite.any() else scale
        if not bool(off <= TOLERANCE * scale + 1e-12):
            raise LayerwiseError(f"walked, its output differs by {float(off):.2g} of {float(scale):.2g}")
    if not compared:
        raise LayerwiseError("its output holds no floating-point tensor")
