"""Load the weights of a model onto the device that computes, for as long as they are used.

A model may be larger than the device's memory: its weights stay in files or in main memory, in the type in which they
are stored, and are copied and converted block by block.
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

# Modules outside the blocks with more bytes than this are loaded only while they are called.
LARGE = 8 << 20
# Name of an empty first parameter: models take device and dtype from their first parameter.
PLACEMENT_PARAMETER = "_placement"


@dataclass(frozen=True)
class ComputePlacement:
    """Where and in which type a model computes.

    Attributes:
        device: of the computation.
        dtype: floating-point numbers of a narrower type are converted to this one for the computation; None: as stored.
            Buffers that are not saved keep their type, as in :func:`eckart.model.clone.cast`.
    """

    device: torch.device
    dtype: torch.dtype | None = None


@dataclass
class _TensorEntry:
    """One entry of a module's parameters or buffers that may be replaced by a copy.

    Attributes:
        module: the module; the reference keeps its id valid.
        table: the module's parameters or buffers.
        key: of the entry.
        original: the tensor that the module owns.
        dtype: the type to compute in.
        idle: the tensor that stands in the table while no one holds the entry.
        holders: number of contexts that hold the entry.
    """

    module: nn.Module
    table: dict[str, Any]
    key: str
    original: Tensor
    dtype: torch.dtype
    idle: Tensor
    holders: int = 0


class WeightLoader:
    """Loads the weights of a model onto the device that computes, and drops them again. One object for each model.

    While modules are held, copies of their tensors replace the originals; afterwards the originals are back, the same
    objects as before, and tensors that were assigned to a held module meanwhile are lost. So replace modules, and read
    the type in which they are stored, while they are not held.

    Args:
        model: The model.
        compute: Where it computes; None leaves all weights where they are.
    """

    def __init__(self, model: nn.Module, compute: ComputePlacement | None) -> None:
        self._model = model
        self._compute = compute
        self._entries: dict[tuple[int, str], _TensorEntry] = {}
        self._copies: dict[tuple[int, torch.dtype], tuple[Tensor, int]] = {}

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        if self._compute is not None:
            return self._compute.device
        return next((p.device for p in self._model.parameters() if not p.is_meta), torch.device("cpu"))

    @property
    def resident(self) -> bool:
        """Whether all weights are in place already: then the methods below do nothing."""
        return all(
            tensor is None or self._in_place(tensor, self._dtype(module, key, tensor))
            for module in self._model.modules()
            for table in (module._parameters, module._buffers)
            for key, tensor in table.items()
        )

    @contextmanager
    def held(self, *names: str) -> Iterator[None]:
        """Hold modules, with all their children, on the device that computes. May be nested.

        Copies of parameters require gradients if the originals do. A tensor that several held modules share is copied
        once.

        Args:
            names: Names of modules; "" is the whole model. Modules that replace them meanwhile are not held.

        Yields:
            Nothing.
        """
        with self._holding(_with_children(self._model.get_submodule(name) for name in names)):
            yield

    @contextmanager
    def streaming(self, blocks: Sequence[str]) -> Iterator[None]:
        """Make `model(**inputs)` work while only one block is held at a time.

        A block is held while its `forward` runs, and so are large modules without children outside the blocks, such as
        output heads. Of a large embedding only the rows that are looked up are loaded. The rest (norms, small tables)
        is held all the time. `forward` is wrapped as an attribute of the module: if it is replaced meanwhile, nothing
        is loaded.

        Models read the type and device of large modules before they call them, so these have lazy weights in place,
        whose values are loaded when they are used; an empty first parameter gives the type and device of the model.

        Args:
            blocks: Names of the blocks.

        Yields:
            Nothing.
        """
        if self.resident:
            yield
            return
        units = [self._model.get_submodule(name) for name in blocks]
        inside = {id(module) for module in _with_children(units)}
        outside = [module for module in self._model.modules() if id(module) not in inside]
        leaves = [module for module in outside if not module._modules and self._size(module) > LARGE]
        large = {id(module) for module in leaves}
        models = [m for m in outside if m is self._model or isinstance(m, PreTrainedModel)]
        with ExitStack() as stack:
            stack.enter_context(self._placed(models))
            stack.enter_context(self._holding([module for module in outside if id(module) not in large]))
            stack.enter_context(self._loaded_on_demand(leaves))
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
            for entry in self._entries_of(modules):
                self._take(entry)
                taken.append(entry)
            yield
        finally:
            for entry in reversed(taken):
                self._release(entry)
            if any(not entry.holders for entry in taken):
                for module in modules:
                    if isinstance(module, Factored):
                        module.train(module.training)  # which drops the working memory it made of the copies

    def _entries_of(self, modules: Iterable[nn.Module]) -> list[_TensorEntry]:
        """The entries of modules whose tensors have to be copied."""
        found = []
        for module in modules:
            for table in (module._parameters, module._buffers):
                for key, tensor in table.items():
                    entry = self._entries.get((id(module), key))
                    if entry is None and tensor is not None:
                        dtype = self._dtype(module, key, tensor)
                        entry = (
                            None
                            if self._in_place(tensor, dtype)
                            else _TensorEntry(module, table, key, tensor, dtype, tensor)
                        )
                    if entry is not None:
                        found.append(entry)
        return found

    def _take(self, entry: _TensorEntry) -> None:
        if not entry.holders:
            place = id(entry.original), entry.dtype
            copy, users = self._copies.get(place) or (self._copy(entry), 0)
            self._copies[place] = copy, users + 1
            entry.table[entry.key] = copy
            self._entries[id(entry.module), entry.key] = entry
        entry.holders += 1

    def _release(self, entry: _TensorEntry) -> None:
        entry.holders -= 1
        if not entry.holders:
            place = id(entry.original), entry.dtype
            copy, users = self._copies.pop(place)
            if users > 1:
                self._copies[place] = copy, users - 1
            self._set_idle(entry, entry.idle)

    def _set_idle(self, entry: _TensorEntry, tensor: Tensor) -> None:
        """Put a tensor into the table of an entry for the time that no one holds it."""
        entry.idle = tensor
        if entry.holders:
            return
        entry.table[entry.key] = tensor
        if tensor is entry.original:
            self._entries.pop((id(entry.module), entry.key), None)
        else:
            self._entries[id(entry.module), entry.key] = entry

    # -- copies ----------------------------------------------------------------------------------------------------

    def _copy(self, entry: _TensorEntry) -> Tensor:
        assert self._compute is not None
        # First the device: a narrow tensor travels faster.
        copy = entry.original.detach().to(self._compute.device).to(entry.dtype)
        if isinstance(entry.original, nn.Parameter):
            return nn.Parameter(copy, requires_grad=entry.original.requires_grad)
        return copy

    def _dtype(self, module: nn.Module, key: str, tensor: Tensor) -> torch.dtype:
        """The type in which an entry is computed."""
        wanted = self._compute.dtype if self._compute is not None else None
        narrow = wanted is not None and tensor.is_floating_point() and tensor.dtype.itemsize < wanted.itemsize
        return (
            wanted if wanted is not None and narrow and key not in module._non_persistent_buffers_set else tensor.dtype
        )

    def _in_place(self, tensor: Tensor, dtype: torch.dtype) -> bool:
        if self._compute is None or tensor.is_meta:
            return True
        device = self._compute.device
        same = tensor.device.type == device.type and device.index in (None, tensor.device.index)
        return same and tensor.dtype == dtype

    def _size(self, module: nn.Module) -> int:
        """Bytes of a module's own parameters in the type in which they are computed."""
        own = ((p, self._dtype(module, key, p)) for key, p in module._parameters.items() if p is not None)
        return sum(parameter.numel() * dtype.itemsize for parameter, dtype in own)

    # -- while a model runs -----------------------------------------------------------------------------------------

    @contextmanager
    def _placed(self, models: Sequence[nn.Module]) -> Iterator[None]:
        """Put an empty parameter before those of models: they report its device and type as theirs."""
        assert self._compute is not None
        changed = []
        for model in models:
            pairs = ((m, key, p) for m in model.modules() for key, p in m._parameters.items() if p is not None)
            dtype = next((self._dtype(*found) for found in pairs if found[2].is_floating_point()), None)
            if dtype is not None and PLACEMENT_PARAMETER not in model._parameters:
                empty = torch.empty(0, dtype=dtype, device=self._compute.device)
                first = {PLACEMENT_PARAMETER: nn.Parameter(empty, requires_grad=False)}
                changed.append((model, {**first, **model._parameters}))
        try:
            for model, parameters in changed:
                model._parameters.clear()
                model._parameters.update(parameters)
            yield
        finally:
            for model, _ in changed:
                model._parameters.pop(PLACEMENT_PARAMETER, None)

    @contextmanager
    def _loaded_on_demand(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Replace parameters by lazy weights of their type, device and shape; each use of the values loads a copy."""
        assert self._compute is not None
        entries = [entry for entry in self._entries_of(modules) if entry.idle is entry.original]
        try:
            for entry in entries:
                like = torch.empty(0, dtype=entry.dtype, device=self._compute.device)
                self._set_idle(
                    entry, _OnDemandWeight.for_values(entry.original, functools.partial(self._copy, entry), like)
                )
            yield
        finally:
            for entry in entries:
                self._set_idle(entry, entry.original)

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
    """A lazy weight that looks up rows in its source, and requires gradients if its source does."""

    _source: Tensor

    @staticmethod
    def for_values(source: Tensor, fetch: Callable[[], Tensor], like: Tensor) -> _OnDemandWeight:
        """The lazy weight of a source, with the type and device of `like`."""
        lazy = LazyWeight.of(fetch, tuple(source.shape), like)
        with torch._C.DisableTorchFunctionSubclass():
            lazy_weight = lazy.as_subclass(_OnDemandWeight)
        lazy_weight._dense, lazy_weight._source = fetch, source
        return lazy_weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func` as :class:`LazyWeight` does; embeddings look rows up in the source."""
        options = kwargs or {}
        if func in (Tensor.requires_grad.__get__, Tensor.requires_grad_):  # type: ignore[attr-defined]
            found = func(args[0]._source, *args[1:], **options)
            return args[0] if func is Tensor.requires_grad_ else found
        # With max_norm, an embedding writes into the table.
        if func is functional.embedding and options.get("max_norm") is None and isinstance(args[1], _OnDemandWeight):
            rows, table = args[0], args[1]
            found = functional.embedding(rows.to(table._source.device), table._source.detach(), *args[2:], **options)
            return found.to(table.device).to(table.dtype)
        return super().__torch_function__(func, types, args, options)


def _with_children(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules and all their children, each once."""
    return list({id(child): child for module in modules for child in module.modules()}.values())
