"""Where a model's numbers are while it computes.

A model may lie in files, in main memory, in a narrow type; what computes needs its weights on a device, in a type that
the device is good at. They are brought there for as long as they are used, and no longer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from eckart.forms import Factored
from eckart.forms.lazy import LazyWeight

# Bytes at the place of computing: above that, a module outside the blocks comes when it is called.
LARGE = 8 << 20
# The name of an empty parameter that tells where a model computes: the first one that anybody asks.
SIGN = "_computes"


@dataclass(frozen=True)
class ComputePlacement:
    """Where and in which type a model computes.

    Attributes:
        device: of the computation.
        dtype: floating-point numbers narrower than this are widened while a module computes; None: as they are stored.
            Buffers that no checkpoint holds keep theirs, as in :func:`eckart.model.clone.cast`.
    """

    device: torch.device
    dtype: torch.dtype | None = None


@dataclass
class _TensorEntry:
    """One entry of a module's parameters or buffers, while it may show something else than its original.

    Attributes:
        module: the module, which has to live as long as its number is used.
        table: the module's parameters or buffers.
        key: of the entry.
        original: what the module owns.
        dtype: the type to compute in.
        shown: what the entry shows while nobody holds it.
        holders: how many do.
    """

    module: nn.Module
    table: dict[str, Any]
    key: str
    original: Tensor
    dtype: torch.dtype
    shown: Tensor
    holders: int = 0


class WeightLoader:
    """Brings the weights of a model to where it computes, and lets go of them. One object a model.

    Copies stand in the modules' own tables while they are held; afterwards the original tensors are back, the same
    objects as before, and whatever was assigned to a held module's entries is gone. So whoever replaces a module, or
    asks for the type that it is stored in, does so while it is not held.

    Args:
        model: The model.
        compute: Where it computes; None for where it is.
    """

    def __init__(self, model: nn.Module, compute: ComputePlacement | None) -> None:
        self._model = model
        self._compute = compute
        self._slots: dict[tuple[int, str], _TensorEntry] = {}
        self._copies: dict[tuple[int, torch.dtype], tuple[Tensor, int]] = {}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        if self._compute is not None:
            return self._compute.device
        return next((p.device for p in self._model.parameters() if not p.is_meta), torch.device("cpu"))

    @property
    def resident(self) -> bool:
        """Whether all weights are where they are computed with already: then nothing below does anything."""
        return all(
            tensor is None or self._there(tensor, self._dtype(module, key, tensor))
            for module in self._model.modules()
            for table in (module._parameters, module._buffers)
            for key, tensor in table.items()
        )

    @contextmanager
    def held(self, *names: str) -> Iterator[None]:
        """Hold modules, and all below them, at the place of computing. May be nested.

        Parameters are copied as parameters that want gradients where the originals do. A tensor that several held
        modules share is copied once.

        Args:
            names: Names of modules; "" is the whole model. A module that is put in place meanwhile is not held.

        Yields:
            Nothing.
        """
        with self._holding(_below(self._model.get_submodule(name) for name in names)):
            yield

    @contextmanager
    def streaming(self, blocks: Sequence[str]) -> Iterator[None]:
        """Let the model run as a whole: inside, `model(**inputs)` works, with one block held at a time.

        A block is held while its `forward` runs, and so are large modules without children outside the blocks: heads.
        Of a large embedding only the rows that are looked up are fetched. The rest (norms, small tables) is held all
        the time. `forward` is wrapped as an attribute of the module, so that whoever puts another one in its place
        meanwhile causes nothing to be fetched.

        Large modules outside the blocks show weights of the right type and device whose values are fetched when they
        are asked for, because models look at them before the call; an empty parameter at the front says for the model
        as a whole where it computes.

        Args:
            blocks: Names of the blocks.

        Yields:
            Nothing.
        """
        if self.resident:
            yield
            return
        units = [self._model.get_submodule(name) for name in blocks]
        inside = {id(module) for module in _below(units)}
        outside = [module for module in self._model.modules() if id(module) not in inside]
        leaves = [module for module in outside if not module._modules and self._size(module) > LARGE]
        large = {id(module) for module in leaves}
        models = [m for m in outside if m is self._model or isinstance(m, PreTrainedModel)]
        with ExitStack() as stack:
            stack.enter_context(self._signed(models))
            stack.enter_context(self._holding([module for module in outside if id(module) not in large]))
            stack.enter_context(self._fetched_on_demand(leaves))
            for module in (*units, *leaves):
                if not isinstance(module, nn.Embedding):
                    stack.enter_context(self._held_by_calls(module))
            yield

    # -- entries ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _holding(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        modules = list(modules)
        taken: list[_TensorEntry] = []
        try:
            for slot in self._slots_of(modules):
                self._take(slot)
                taken.append(slot)
            yield
        finally:
            for slot in reversed(taken):
                self._release(slot)
            if any(not slot.holders for slot in taken):
                for module in modules:
                    if isinstance(module, Factored):
                        module.train(module.training)  # which drops the working memory it made of the copies

    def _slots_of(self, modules: Iterable[nn.Module]) -> list[_TensorEntry]:
        """The entries of modules that have to be brought somewhere."""
        found = []
        for module in modules:
            for table in (module._parameters, module._buffers):
                for key, tensor in table.items():
                    slot = self._slots.get((id(module), key))
                    if slot is None and tensor is not None:
                        dtype = self._dtype(module, key, tensor)
                        slot = (
                            None
                            if self._there(tensor, dtype)
                            else _TensorEntry(module, table, key, tensor, dtype, tensor)
                        )
                    if slot is not None:
                        found.append(slot)
        return found

    def _take(self, slot: _TensorEntry) -> None:
        if not slot.holders:
            place = id(slot.original), slot.dtype
            copy, users = self._copies.get(place) or (self._copy(slot), 0)
            self._copies[place] = copy, users + 1
            slot.table[slot.key] = copy
            self._slots[id(slot.module), slot.key] = slot
        slot.holders += 1

    def _release(self, slot: _TensorEntry) -> None:
        slot.holders -= 1
        if not slot.holders:
            place = id(slot.original), slot.dtype
            copy, users = self._copies.pop(place)
            if users > 1:
                self._copies[place] = copy, users - 1
            self._show(slot, slot.shown)

    def _show(self, slot: _TensorEntry, tensor: Tensor) -> None:
        """Let an entry show a tensor whenever nobody holds it."""
        slot.shown = tensor
        if slot.holders:
            return
        slot.table[slot.key] = tensor
        if tensor is slot.original:
            self._slots.pop((id(slot.module), slot.key), None)
        else:
            self._slots[id(slot.module), slot.key] = slot

    # -- copies ----------------------------------------------------------------------------------------------------

    def _copy(self, slot: _TensorEntry) -> Tensor:
        assert self._compute is not None
        # First the device: a narrow tensor travels faster.
        copy = slot.original.detach().to(self._compute.device).to(slot.dtype)
        if isinstance(slot.original, nn.Parameter):
            return nn.Parameter(copy, requires_grad=slot.original.requires_grad)
        return copy

    def _dtype(self, module: nn.Module, key: str, tensor: Tensor) -> torch.dtype:
        """The type that an entry is computed with."""
        wanted = self._compute.dtype if self._compute is not None else None
        narrow = wanted is not None and tensor.is_floating_point() and tensor.dtype.itemsize < wanted.itemsize
        return (
            wanted if wanted is not None and narrow and key not in module._non_persistent_buffers_set else tensor.dtype
        )

    def _there(self, tensor: Tensor, dtype: torch.dtype) -> bool:
        if self._compute is None or tensor.is_meta:
            return True
        device = self._compute.device
        same = tensor.device.type == device.type and device.index in (None, tensor.device.index)
        return same and tensor.dtype == dtype

    def _size(self, module: nn.Module) -> int:
        """Bytes of a module's own parameters at the place of computing."""
        own = ((p, self._dtype(module, key, p)) for key, p in module._parameters.items() if p is not None)
        return sum(parameter.numel() * dtype.itemsize for parameter, dtype in own)

    # -- what a running model sees ---------------------------------------------------------------------------------

    @contextmanager
    def _signed(self, models: Sequence[nn.Module]) -> Iterator[None]:
        """Put the sign in front of models' parameters: its device and type are those that the model reports."""
        assert self._compute is not None
        signed = []
        for model in models:
            pairs = ((m, key, p) for m in model.modules() for key, p in m._parameters.items() if p is not None)
            dtype = next((self._dtype(*found) for found in pairs if found[2].is_floating_point()), None)
            if dtype is not None and SIGN not in model._parameters:
                sign = nn.Parameter(torch.empty(0, dtype=dtype, device=self._compute.device), requires_grad=False)
                signed.append((model, {SIGN: sign, **model._parameters}))
        try:
            for model, parameters in signed:
                model._parameters.clear()
                model._parameters.update(parameters)
            yield
        finally:
            for model, _ in signed:
                model._parameters.pop(SIGN, None)

    @contextmanager
    def _fetched_on_demand(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Let parameters show their type, device and shape; whoever asks for values gets a copy of his own."""
        assert self._compute is not None
        slots = [slot for slot in self._slots_of(modules) if slot.shown is slot.original]
        try:
            for slot in slots:
                like = torch.empty(0, dtype=slot.dtype, device=self._compute.device)
                self._show(slot, _OnDemandWeight.for_values(slot.original, functools.partial(self._copy, slot), like))
            yield
        finally:
            for slot in slots:
                self._show(slot, slot.original)

    @contextmanager
    def _held_by_calls(self, module: nn.Module) -> Iterator[None]:
        """Hold a module while its `forward` runs."""
        before = vars(module).get("forward")
        own: Callable[..., Any] = module.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._holding(module.modules()):
                return own(*args, **kwargs)

        module.forward = forward
        try:
            yield
        finally:
            if before is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before


class _OnDemandWeight(LazyWeight):
    """A lazy weight that looks up rows where they are, and wants gradients as long as its source does."""

    _source: Tensor

    @staticmethod
    def for_values(source: Tensor, fetch: Callable[[], Tensor], like: Tensor) -> _OnDemandWeight:
        """The lazy weight of a source, with the type and device of `like`."""
        lazy = LazyWeight.of(fetch, tuple(source.shape), like)
        with torch._C.DisableTorchFunctionSubclass():
            waiting = lazy.as_subclass(_OnDemandWeight)
        waiting._dense, waiting._source = fetch, source
        return waiting

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func` as :class:`LazyWeight` does, an embedding on the stored table."""
        options = kwargs or {}
        if func in (Tensor.requires_grad.__get__, Tensor.requires_grad_):  # type: ignore[attr-defined]
            found = func(args[0]._source, *args[1:], **options)
            return args[0] if func is Tensor.requires_grad_ else found
        # max_norm writes into the table.
        if func is functional.embedding and options.get("max_norm") is None and isinstance(args[1], _OnDemandWeight):
            rows, table = args[0], args[1]
            found = functional.embedding(rows.to(table._source.device), table._source.detach(), *args[2:], **options)
            return found.to(table.device).to(table.dtype)
        return super().__torch_function__(func, types, args, options)


def _below(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules and all below them, each once."""
    return list({id(child): child for module in modules for child in module.modules()}.values())
