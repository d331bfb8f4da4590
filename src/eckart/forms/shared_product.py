"""The product of a factor that several modules share, computed once for all of them that read one input.

A model calls `q_proj(x)`, `k_proj(x)` and `v_proj(x)` one after the other, with one and the same tensor. The first of
them leaves the product `A x` on x itself, as an attribute; the others find it there, and the last one takes it away.
So the product lives while x does, and no longer than its last reader needs it; no list has to be kept of what was seen,
and threads, which have tensors of their own, do not meet.

Everything that changes the answer is compared: identity and version of x and of A, their places in memory, gradients,
autocast, the thread and, on a GPU, the stream. Whatever else may run where the leaf is called (an adapter, a hook, an
offloader, a weight that others have quantized), or where a tensor is not what it seems (transforms, fake tensors,
tracing), the leaf is called as the module that it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from eckart.forms.base import is_plain_linear, numbers_of

ATTRIBUTE = "_eckart_shared_product"

TRACED_SINCE = (2, 13)
"""The version of torch from which on TorchDynamo is known to trace what :mod:`eckart.forms.traced_product` does."""

_CAN_TRACE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= TRACED_SINCE


class SharedProduct:
    """`A x`, for those modules that have not read it yet.

    Attributes:
        weight: A.
        state: all else that the product depends on.
        left: how many modules have not read it.
        mark: what tells this content of x from another, where x counts no versions.
    """

    __slots__ = ("_strong", "_weak", "left", "mark", "state", "weight")

    def __init__(self, weight: Tensor, state: object, hidden: Tensor, left: int, mark: Tensor | None) -> None:
        self.weight, self.state, self.left, self.mark = weight, state, left, mark
        # With a graph: x would hold the product, and the product's graph x, in a circle that Python does not see. What
        # reads the product keeps it for the backward pass anyway; when that has freed it, it is computed again.
        graph = hidden.grad_fn is not None
        self._strong: Tensor | None = None if graph else hidden
        self._weak: TensorWeakRef | None = TensorWeakRef(hidden) if graph else None

    @property
    def hidden(self) -> Tensor | None:
        """The product; None when its graph is gone."""
        return self._strong if self._weak is None else self._weak()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # no part of a copied or saved x


def shared_product(
    leaf: nn.Module, x: Tensor, readers: int, product: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`A x`, which is computed when the first of several modules asks for it.

    Args:
        leaf: of the module that asks, quantized or not; its weight A is the same parameter in all of them.
        x: (..., n).
        readers: how many modules share A.
        product: makes it, with the leaf; None for the leaf itself.

    Returns:
        (..., k).
    """
    compute = product or leaf
    if readers < 2:
        return compute(x)
    if torch.compiler.is_dynamo_compiling():
        if not _CAN_TRACE:
            return compute(x)
        from eckart.forms.traced_product import traced_product

        return traced_product(leaf, x, readers, compute)
    state = _state(leaf, x)
    if state is None:
        return compute(x)
    known: SharedProduct | None = x.__dict__.get(ATTRIBUTE)
    if (
        known is not None
        and known.weight is numbers_of(leaf)
        and known.state == state
        and (hidden := known.hidden) is not None
        and (known.mark is None or torch.equal(known.mark, _mark(x)))
    ):
        known.left -= 1
        if known.left < 1:
            x.__dict__.pop(ATTRIBUTE, None)
        return hidden
    hidden = compute(x)
    mark = _mark(x) if x.is_inference() else None
    x.__dict__[ATTRIBUTE] = SharedProduct(numbers_of(leaf), state, hidden, readers - 1, mark)
    return hidden


def _state(leaf: nn.Module, x: Tensor) -> tuple[object, ...] | None:
    """All that the product depends on besides x and A themselves; None where it may not be shared."""
    if torch.compiler.is_compiling():
        # Exported: the tensors are fake, and so are the parameters, but each is the same object wherever it is read.
        exporting = getattr(torch.compiler, "is_exporting", lambda: False)()
        return (x._version, torch.is_grad_enabled()) if exporting and is_plain_linear(leaf, fake=True) else None
    if type(x) is not Tensor or not is_plain_linear(leaf):
        return None
    device, weight = x.device, numbers_of(leaf)
    if (
        device.type == "meta"
        or weight.is_inference()  # its changes leave no mark
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, grad and others: x is a wrapper
    ):
        return None
    inference = x.is_inference()
    if inference and device.type != "cpu":
        return None  # comparing what it holds would wait for the device
    autocast = torch.is_autocast_enabled(device.type)
    return (
        threading.get_ident(),
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(device.type) if autocast else None,
        None if inference else x._version,
        x.data_ptr(),
        x.shape,
        x.requires_grad,
        weight._version,
        weight.data_ptr(),
        weight.requires_grad,
        _queue(device),
    )


def _mark(x: Tensor) -> Tensor:
    """The product with a random vector: hardly a change of x that is more than rounding leaves it as it was."""
    return x @ _random_vector(x.shape[-1], x.dtype)


@lru_cache(maxsize=64)
def _random_vector(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _queue(device: torch.device) -> tuple[int, bool] | None:
    """What work on a GPU waits for: its stream, and whether that is being recorded into a graph."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()
