"""A weight that is computed when its values are read, not when its dtype is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_FREE = frozenset(
    {
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
        Tensor.is_meta.__get__,  # type: ignore[attr-defined]
        Tensor.layout.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        Tensor.size,
        Tensor.dim,
        Tensor.data_ptr,
        Tensor.numel,
        Tensor.is_floating_point,
        Tensor.__len__,
    }
)


class LazyWeight(Tensor):
    """Shape, dtype and device at no cost; any other use computes the dense matrix first."""

    _dense: Callable[[], Tensor]

    @staticmethod
    def of(dense: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor) -> LazyWeight:
        """A lazy weight of `shape`, with the dtype, device and place in memory of `like`.

        So the weights of two modules lie in one place where their numbers do, which is how peft sees that they are
        tied.
        """
        # A stride of zero: one stored element stands for the whole shape until it is asked for.
        plain = like.numel() > 0 and type(like) in (Tensor, nn.Parameter)
        one = like.detach().as_strided((), ()) if plain else torch.empty((), dtype=like.dtype, device=like.device)
        lazy = one.expand(shape).as_subclass(LazyWeight)
        lazy._dense = dense
        return lazy

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func` on the dense matrix, or on the shell where values do not matter."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FREE:
                return func(*args, **(kwargs or {}))
            return func(*_filled(args), **{key: _filled(value) for key, value in (kwargs or {}).items()})


def _filled(value: Any) -> Any:
    if isinstance(value, LazyWeight):
        return value._dense()
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(item) for item in value)
    return value
