"""Whether running a model block by block gives what running it whole gives: tried on one example beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from eckart.calibration.forward_context import ForwardContext
from eckart.calibration.layerwise.block_forward import BlockChain
from eckart.calibration.layerwise.blocks import LayerwiseError, schedule_of
from eckart.calibration.layerwise.hidden_states import HiddenStateStore
from eckart.calibration.layerwise.runner import LayerwiseRunner
from eckart.errors import NumericalError, is_out_of_memory

OTHERS_FINITE = "block by block, other numbers of its output are finite"

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
    context: ForwardContext = lambda _: nullcontext(),
    device: torch.device | None = None,
) -> BlockChain:
    """Find the steps of a model, and run one example through them.

    Args:
        model: in evaluation mode, or brought into it by `context`.
        names: modules whose segments are to be known.
        run: runs the model on a batch and returns its output.
        example: a batch of one row.
        store: keeps hidden states meanwhile.
        backward: whether it will be run backwards too. Then the output of a named module between two blocks may be
            read by the next block alone: the gradient at it comes in one piece.
        context: makes the model ready to run.
        device: where it computes; None for the CPU.

    Returns:
        The model, its steps, and what each puts out.

    Raises:
        LayerwiseError: there are no blocks, or the output is not that of a whole pass; the text says why.
    """
    with context(None), torch.no_grad():
        plain: list[Any] = []
        schedule = schedule_of(model, names, lambda: plain.append(run(example)))
        chain = BlockChain(model, schedule, run, device or torch.device("cpu"))
        runner = LayerwiseRunner(chain, [example], store, context=context, name="trace")
        handles = _spoil_later_reads(chain) if backward else []
        try:
            for step in range(schedule.tail):
                runner.advance(step)
            found = runner.run_tail(example)
        except LayerwiseError:
            raise
        except NumericalError as error:
            if _holds_nan(plain[0]):  # in a whole pass too: it is no stand-in that was read
                raise
            raise LayerwiseError(OTHERS_FINITE) from error
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            # Whatever a model's own code raises on a stand-in.
            raise LayerwiseError(f"with stand-ins for its blocks it fails: {type(error).__name__}: {error}") from error
        finally:
            for handle in handles:
                handle.remove()
            runner.drop_all()
    _compare(plain[0], found)
    return chain


def _holds_nan(output: Any) -> bool:
    leaves = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return any(bool(leaf.isnan().any()) for leaf in leaves)


def _spoil_later_reads(chain: BlockChain) -> list[Any]:
    """Modules between blocks put out NaN in all passes but their own segment's: a later reader is found out."""

    def spoil(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            later = chain.segment > max(chain.schedule.segments[name])
            return torch.full_like(output, float("nan")) if later and isinstance(output, Tensor) else output

        return hook

    return [chain.model.get_submodule(name).register_forward_hook(spoil(name)) for name in chain.schedule.between]


def _compare(whole: Any, layerwise: Any) -> None:
    pairs = zip(pytree.tree_leaves(whole), pytree.tree_leaves(layerwise), strict=False)
    compared = 0
    for expected, found in pairs:
        if not isinstance(expected, Tensor) or not expected.is_floating_point():
            continue
        compared += 1
        if found.shape != expected.shape:
            raise LayerwiseError(f"block by block, it puts out {tuple(found.shape)} instead of {tuple(expected.shape)}")
        finite = torch.isfinite(expected)  # a logit may be minus infinity
        if not bool((torch.isfinite(found) == finite).all()):
            raise LayerwiseError(OTHERS_FINITE)
        scale = expected[finite].abs().amax() if finite.any() else expected.new_zeros(())
        off = (found - expected)[finite].abs().amax() if finite.any() else scale
        if not bool(off <= TOLERANCE * scale + 1e-12):
            raise LayerwiseError(f"block by block, its output differs by {float(off):.2g} of {float(scale):.2g}")
    if not compared:
        raise LayerwiseError("its output holds no floating-point tensor")
