"""Hidden neurons of feed-forward layers: found by probing the model, and removed.

A neuron is an output of one linear layer (or of two, where one gates the other; or two outputs of one that computes
both) that reaches the model's result only as the same-numbered input of another linear layer. Whether that is so is
tried on a batch, bit by bit, not read off names; and so is whether the model's own code runs with fewer. Then the
neuron's rows and its column can go, and the result is that of a model in which its output is zero.

A layer is tried in the smallest module around it that can be called, on what that module was called with: a model that
does not fit into memory is run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.model.attention_heads import head_of_each_row, select_features
from eckart.model.config_sizes import find_config_sizes
from eckart.model.experts import SeparateExperts
from eckart.model.probe import Call, Probe, probing, record_calls
from eckart.model.replace import replace_module
from eckart.model.sites import Site, dense_weight

LAYOUTS: tuple[tuple[int, ...], ...] = ((1,), (1, 1), (2,))
"""Rows of one neuron in a writer: one; one in each half (a gate and an up projection in one matrix); two in turn."""

WRITERS = 2
"""At most: an up projection and its gate."""

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far the result without some neurons may be from the one in which they are zero, of the largest number in it."""


@dataclass(frozen=True)
class NeuronLayer:
    """The neurons of one layer.

    Attributes:
        reader: the linear layer that reads them.
        writers: those that make them.
        width: how many there are.
        rows: of each writer, the rows of one neuron in each part of its matrix: see :data:`LAYOUTS`.
    """

    reader: str
    writers: tuple[str, ...]
    width: int
    rows: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """How many there are, as of heads."""
        return self.width

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers: the reader, then the writers."""
        return (self.reader, *self.writers)

    def rows_of(self, writer: str, neurons: Tensor) -> Tensor:
        """Numbers of a writer's rows that make some neurons, in the order of the rows.

        Args:
            writer: one of the writers.
            neurons: (k,) int64, ascending.
        """
        owners = head_of_each_row(self.rows[self.writers.index(writer)], self.width).to(neurons.device)
        return torch.isin(owners, neurons).nonzero().flatten()

    def neuron_rows(self, writer: str, weight: Tensor) -> Tensor:
        """A writer's weight (rows, in) as (width, rows of one neuron, in)."""
        owners = head_of_each_row(self.rows[self.writers.index(writer)], self.width).to(weight.device)
        return weight[owners.argsort(stable=True)].unflatten(0, (self.width, -1))


def find_neurons(
    model: nn.Module,
    sites: Sequence[Site],
    inputs: Mapping[str, Tensor],
    hold: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> tuple[list[NeuronLayer], dict[str, str]]:
    """Every layer of hidden neurons, each proven by probes.

    Experts of a mixture that are separate modules are tried one by one, on tokens that are drawn at random.

    Args:
        model: in any mode; it is left as it was. It can be called, or has a wrapper in place with which it can.
        sites: the linear layers that may take part.
        inputs: a small batch without labels.
        hold: brings the weights of a module to where they compute; by default they are there.

    Returns:
        The layers in order of the pass, those of separate experts last, and reader -> why its inputs are left.
    """
    shapes = {site.name: site.shape for site in sites}
    experts = {name: module for name, module in model.named_modules() if isinstance(module, SeparateExperts)}
    routed = [name for name in shapes if any(name.startswith(f"{place}.") for place in experts)]
    with probing(model):
        plain = _run_once(model, [name for name in shapes if name not in routed], inputs)
        tried = _Trials(model, shapes, plain.calls, plain.arguments, hold)
        for reader, before in _candidates(shapes, plain.order):
            tried.add(reader, before)
        for name, module in experts.items():
            with hold(name):  # once for all of them
                for number in range(len(module.each)):
                    members = (f"{name}.each.{number}.down", f"{name}.each.{number}.up")
                    if all(member in shapes for member in members):
                        tried.arguments[name] = _random_call(module, number)
                        tried.calls |= dict.fromkeys(members, 1)
                        tried.add(members[0], [members[1]])
        return tried.found, tried.left


@dataclass(frozen=True)
class _Pass:
    """What one pass of the model shows: how often layers are called, in which order, and arguments of modules."""

    calls: dict[str, int]
    order: list[str]
    arguments: dict[str, Call]


def _run_once(model: nn.Module, names: Sequence[str], inputs: Mapping[str, Tensor]) -> _Pass:
    order: list[str] = []
    handles = [model.get_submodule(name).register_forward_pre_hook(_noting(order, name)) for name in names]
    around = dict.fromkeys(parent for name in names for parent in _parents(name))
    try:
        arguments = record_calls(model, [name for name in around if _runs(model.get_submodule(name))], inputs)
    finally:
        for handle in handles:
            handle.remove()
    return _Pass({name: order.count(name) for name in order}, list(dict.fromkeys(order)), arguments)


def _noting(order: list[str], name: str) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        order.append(name)

    return hook


def _runs(module: nn.Module) -> bool:
    """Whether a module can be called; lists of modules, and bare ones, cannot."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _parents(name: str) -> Iterator[str]:
    """The modules around a module, from the inside out; the last one is the model, ""."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _candidates(shapes: Mapping[str, tuple[int, int]], order: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each layer with those before it that could make what it reads: of the smallest module that holds such."""
    for place, reader in enumerate(order):
        width = shapes[reader][1]
        for parent in _parents(reader):
            inside = f"{parent}." if parent else ""
            before = [
                name
                for name in order[:place]
                if name.startswith(inside) and any(shapes[name][0] == sum(rows) * width for rows in LAYOUTS)
            ]
            if before:
                yield reader, before[-WRITERS:]
                break


def _random_call(experts: SeparateExperts, number: int) -> Call:
    """Arguments with which experts are called so that a few random tokens go to one of them."""
    weight: Any = experts.each[number].up.weight  # type: ignore[union-attr]
    stream = torch.Generator().manual_seed(number)
    x = torch.randn(4, weight.shape[1], generator=stream).to(weight)
    index = torch.full((4, 1), number, device=weight.device)
    return (x, index, torch.ones_like(x[:, :1])), {}


@dataclass
class _Trials:
    """Tries layers one by one, each inside the smallest module around it that can be called."""

    model: nn.Module
    shapes: Mapping[str, tuple[int, int]]
    calls: dict[str, int]
    arguments: dict[str, Call]
    hold: Callable[[str], AbstractContextManager[None]]

    def __post_init__(self) -> None:
        self.found: list[NeuronLayer] = []
        self.left: dict[str, str] = {}

    def add(self, reader: str, before: Sequence[str]) -> None:
        """Try a layer with those that may make what it reads."""
        around = next(
            (
                parent
                for parent in _parents(reader)
                if parent in self.arguments and all(name.startswith(f"{parent}." if parent else "") for name in before)
            ),
            None,
        )
        if around is None or self.calls[reader] > 1:
            self.left[reader] = "it is called more than once a pass, or not with one tensor"
            return
        with self.hold(around):
            trial = _Trial.of(self.model, around, reader, self.arguments[around])
            proven = [
                (name, rows)
                for name in before
                if self.calls[name] == 1 and (rows := trial.layout(name, *self.shapes[name][:1])) is not None
            ]
            layer = NeuronLayer(
                reader, tuple(name for name, _ in proven), self.shapes[reader][1], tuple(rows for _, rows in proven)
            )
            if not proven:
                self.left[reader] = f"no trial shows that its inputs are outputs of {' or '.join(before)} one to one"
            elif not trial.runs_with_fewer(layer):
                self.left[reader] = "with fewer neurons its code does not do what it does when they are zero"
            else:
                self.found.append(layer)


@dataclass(frozen=True)
class _Trial:
    """A module around one reader, with the arguments that it was called with, and what the reader then reads."""

    module: nn.Module
    inner: int
    reader: str
    call: Call
    expected: Tensor | None
    plain: Probe

    @classmethod
    def of(cls, model: nn.Module, around: str, reader: str, call: Call) -> _Trial:
        module, inner = model.get_submodule(around), len(around) + 1 if around else 0
        plain = Probe().run(module, [reader[inner:]], *call[0], **call[1])
        return cls(module, inner, reader, call, plain.read.get(reader[inner:]), plain)

    def layout(self, writer: str, rows: int) -> tuple[int, ...] | None:
        """The rows of one neuron in a writer, if its outputs reach the result only as the reader's inputs."""
        if self.expected is None or self.expected.dim() < 2:
            return None
        width = self.expected.shape[-1]
        layouts = [sizes for sizes in LAYOUTS if rows == sum(sizes) * width]
        return next((sizes for sizes in layouts if self._feeds_only(writer, sizes)), None)

    def _run(self, writer: str, change: Any, replaced: Mapping[str, Tensor]) -> Probe:
        names = [self.reader[self.inner :], writer[self.inner :]]
        probe = Probe(change={names[1]: change}, replaced=replaced)
        return probe.run(self.module, names, *self.call[0], **self.call[1])

    def _feeds_only(self, writer: str, sizes: tuple[int, ...]) -> bool:
        """Whether the writer's outputs reach the result only as the reader's inputs, one to one and token by token."""
        reader, expected = self.reader[self.inner :], self.expected
        assert expected is not None
        width = expected.shape[-1]
        stream = torch.Generator().manual_seed(0)
        chosen = torch.randperm(width, generator=stream)[: max(1, width // 2)]
        elsewhere = torch.ones(width, dtype=torch.bool)
        elsewhere[chosen] = False
        rows = torch.isin(head_of_each_row(sizes, width), chosen)

        def some(output: Tensor) -> Tensor:
            moved = output.clone()
            first = moved[..., 0, :]  # of the first token alone
            noise = torch.randn(first[..., rows].shape, generator=stream).to(first)
            first[..., rows] += (1 + 3 * output.std()) * noise
            return moved

        def every(output: Tensor) -> Tensor:
            return output + (1 + 3 * output.std()) * torch.randn(output.shape, generator=stream).to(output)

        seen = self._run(writer, some, {}).read.get(reader)
        if seen is None or seen.shape != expected.shape:
            return False
        mixed = not torch.equal(seen[..., elsewhere], expected[..., elsewhere])
        spread = not torch.equal(seen[..., 1:, :], expected[..., 1:, :])
        if mixed or spread or torch.equal(seen, expected):
            return False
        return self._run(writer, every, {reader: expected}).gives(self.plain)

    def runs_with_fewer(self, layer: NeuronLayer) -> bool:
        """Whether the module gives with half of the neurons what it gives with the others at zero."""
        neurons = torch.arange(0, layer.width, 2)
        old = {name: self.module.get_submodule(name[self.inner :]) for name in layer.names}
        silent = set_columns_to_zero(old[layer.reader], torch.arange(1, layer.width, 2))
        args, named = self.call
        try:
            replace_module(self.module, layer.reader[self.inner :], silent)
            wanted = Probe().run(self.module, [], *args, **named).results
            for name, module in sliced_layers(old, layer, neurons).items():
                replace_module(self.module, name[self.inner :], module)
            found = Probe().run(self.module, [], *args, **named).results
        except Exception:  # whatever a model's own code raises: it cannot do with fewer
            return False
        finally:
            for name, module in old.items():
                replace_module(self.module, name[self.inner :], module)
        return [one.shape for one in wanted] == [one.shape for one in found] and all(map(is_near, found, wanted))


def is_near(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are equal up to :data:`CLOSE`."""
    if not wanted.is_floating_point() or not wanted.numel():
        return torch.equal(found, wanted)
    return bool((found - wanted).abs().amax() <= CLOSE.get(wanted.dtype, 1e-2) * wanted.abs().amax())


def set_columns_to_zero(old: nn.Module, columns: Tensor) -> Any:
    """A copy of a Linear or Conv1D that does not read some of its inputs."""
    new: Any = select_features(old, torch.arange(dense_weight(old).shape[1]), rows=False)
    with torch.no_grad():
        dense_weight(new)[:, columns.to(new.weight.device)] = 0
    return new


def sliced_layers(old: Mapping[str, nn.Module], layer: NeuronLayer, neurons: Tensor) -> dict[str, nn.Module]:
    """Copies of a layer's reader and writers with some of its neurons alone.

    Args:
        old: name -> module.
        layer: its neurons.
        neurons: (k,) int64 ascending, those that stay.
    """
    fewer = {name: select_features(old[name], layer.rows_of(name, neurons), rows=True) for name in layer.writers}
    return fewer | {layer.reader: select_features(old[layer.reader], neurons, rows=False)}


def magnitudes(reader: Tensor, writers: Sequence[Tensor]) -> Tensor:
    """A proxy of what each neuron matters, (width,): norm of its column times the norm of its rows.

    It reads weights alone, no activation: cheap, and no substitute for gates that were trained.

    Args:
        reader: (out, width) weight of the layer that reads the neurons.
        writers: (width, in) weights of those that make them, or (width, rows of one neuron, in).
    """
    rows = torch.stack([weight.float().flatten(1).norm(dim=1) for weight in writers])
    return reader.float().norm(dim=0) * rows.norm(dim=0)


def remove_neurons(model: PreTrainedModel, kept: Mapping[NeuronLayer, Tensor]) -> str | None:
    """Take neurons out of their layers, and say so in the model's configuration, in place.

    The configuration's number is found by trial: :func:`eckart.model.config_sizes.find_config_sizes`.

    Args:
        model: with dense modules at all sites.
        kept: layer -> (width,) bool. As many must stay in every layer of one width.

    Returns:
        None, or why nothing was changed.
    """
    old = {name: model.get_submodule(name) for layer in kept for name in layer.names}
    widths = {layer.width: int(mask.sum()) for layer, mask in kept.items()}
    for layer, mask in kept.items():
        for name, module in sliced_layers(old, layer, mask.nonzero().flatten()).items():
            replace_module(model, name, module)
    config = find_config_sizes(model, widths)
    if config is None:
        for name, module in old.items():
            replace_module(model, name, module)
        return "no number of the model's configuration says how wide these layers are, so that it could be loaded again"
    for key, value in config.items():
        setattr(model.config, key, value)
    return None
