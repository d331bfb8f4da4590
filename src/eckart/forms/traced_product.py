"""The same as :mod:`eckart.forms.shared_product` in a graph that TorchDynamo traces: one product in the graph.

Compilers do not drop a repeated product by themselves: Inductor does so for training, not for inference. What is
traced here is the same: the product is left on x. Whether it may be read is decided while tracing, by functions that
Dynamo runs instead of tracing them: only what this very trace has left there, and on an x that was not changed since.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import assume_constant_result
from torch._dynamo.comptime import comptime

from eckart.forms.base import is_plain_linear

ATTRIBUTE = "_eckart_traced_product"

_seen = threading.local()


def traced_product(leaf: nn.Module, x: Tensor, readers: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """`A x`; arguments are those of :func:`eckart.forms.shared_product.shared_product`."""
    if torch.is_grad_enabled() or type(leaf) is not nn.Linear or not is_plain_linear(leaf):
        return compute(x)
    comptime(_look)
    known = getattr(x, ATTRIBUTE, None)
    if known is not None and _is_known() and known[0] is leaf.weight:
        setattr(x, ATTRIBUTE, (known[0], known[1], known[2] - 1) if known[2] > 1 else None)
        return known[1]
    hidden = compute(x)
    if _remember():
        setattr(x, ATTRIBUTE, (leaf.weight, hidden, readers - 1))
    return hidden


def _look(context: Any) -> None:
    """Take down which tensor of which trace the caller's `x` is, and its version."""
    fake = context.get_local("x").as_fake()
    _seen.now = (weakref.ref(fake), fake._version)


@assume_constant_result
def _remember() -> bool:
    _seen.kept = _seen.now
    return True


@assume_constant_result
def _is_known() -> bool:
    kept, now = getattr(_seen, "kept", None), _seen.now
    return kept is not None and kept[0]() is now[0]() and kept[1] == now[1]
