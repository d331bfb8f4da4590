"""Runs of a module in which some outputs are changed or some inputs replaced, and what its linear layers then read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass
class Probe:
    """One run: outputs that are changed, inputs that are replaced, and what was seen.

    Attributes:
        change: layer -> function of its output.
        replaced: layer -> what it reads in place of its own input.
        calls: names of the layers in the order in which they were called.
        read: layer -> its last input, where it was called with one tensor.
        result: the first of what the module gave.
        results: every tensor that it gave.
    """

    change: Mapping[str, Any] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    read: dict[str, Tensor] = field(default_factory=dict)
    result: Tensor | None = None
    results: list[Tensor] = field(default_factory=list)

    def run(self, module: nn.Module, names: Sequence[str], *args: Any, **inputs: Any) -> Probe:
        """Call the module, and watch the layers of these names; returns itself."""
        with ExitStack() as stack, torch.no_grad():
            for name in names:
                layer = module.get_submodule(name)
                stack.callback(layer.register_forward_pre_hook(self._before(name)).remove)
                stack.callback(layer.register_forward_hook(self._after(name)).remove)
            made = module(*args, **inputs)
        self.result = made if isinstance(made, Tensor) else made[0]
        self.results = list(_tensors(made))
        return self

    def gives(self, other: Probe) -> bool:
        """Whether both runs gave the same tensors, bit by bit."""
        return len(self.results) == len(other.results) and all(map(torch.equal, self.results, other.results))

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            self.calls.append(name)
            if args:
                self.read[name] = args[0]
            return (self.replaced[name], *args[1:]) if name in self.replaced else None

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            return self.change[name](output) if name in self.change else None

        return hook


def _tensors(made: Any) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, Mapping):
        yield from _tensors(list(made.values()))
    elif isinstance(made, list | tuple):
        for part in made:
            yield from _tensors(part)


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments."""


def record_calls(model: nn.Module, names: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Call]:
    """The arguments with which modules are first called in a pass, in memory of their own.

    Args:
        model: that holds them.
        names: of the modules; those that no token reaches are left out.
        inputs: of the pass.
    """
    calls: dict[str, Call] = {}

    def recording(name: str) -> Any:
        def hook(module: nn.Module, args: Any, named: Any) -> None:
            if name not in calls:
                calls[name] = tree_map(_copied, (args, named))

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(recording(name), with_kwargs=True)
            stack.callback(handle.remove)
        model(**inputs)
    return calls


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without a cache of keys and values; it is left as it was."""
    training = {module: module.training for module in model.modules()}
    found: list[Any] = [getattr(module, "config", None) for module in training]  # encoders and decoders have own ones
    configs = {id(config): config for config in found if getattr(config, "use_cache", False)}
    model.eval()
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config in configs.values():
            config.use_cache = True
