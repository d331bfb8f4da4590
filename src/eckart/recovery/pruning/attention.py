"""Probing one attention of a model: which rows belong to which head, and whether its code runs with fewer heads."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.model import PrunedHeads, dense_weight, forget_pruned_heads, head_of_each_row
from eckart.model.probe import Probe

CLOSE = 1e-5
"""How far fewer heads may be from heads whose output is zero, of the largest output."""


@dataclass(frozen=True)
class HeadLayout:
    """The heads of one attention.

    Attributes:
        module: the attention.
        reader: the linear layer that reads them, inside it.
        writers: layers that make them, and the rows of one head in each, as in :class:`eckart.model.PrunedHeads`.
        count: how many there are; heads that read the same keys and values are one.
        size: columns of one in the reader.
        numbers: attributes of the module that follow the number of heads.
    """

    module: str
    reader: str
    writers: tuple[tuple[str, tuple[int, ...]], ...]
    count: int
    size: int
    numbers: tuple[tuple[str, int], ...] = ()

    @property
    def each(self) -> int:
        """Attention heads of one: queries that read the same keys and values, `g d + d + d` rows to `g d` columns."""
        width = (sum(sum(sizes) for _, sizes in self.writers) - self.size) // 2
        return self.size // width if width and self.size % width == 0 else 1

    def cut(self, kept: Sequence[int]) -> PrunedHeads:
        """What is to be done to the module so that these heads stay."""
        inner = len(self.module) + 1
        rows = {name[inner:]: sizes for name, sizes in self.writers}
        numbers = {name: value * len(kept) // self.count for name, value in self.numbers}
        return PrunedHeads(self.count, tuple(kept), rows, {self.reader[inner:]: self.size}, numbers)


class AttentionProbe:
    """A module with the arguments of its first call, so that it can be tried apart from the model."""

    def __init__(
        self, model: nn.Module, name: str, reader: str, writers: tuple[str, ...], inputs: Mapping[str, Tensor]
    ) -> None:
        self.name, self.reader, self.writers = name, reader, writers
        self.module = model.get_submodule(name)
        calls: list[Any] = []

        def keep(module: nn.Module, args: Any, named: Any) -> None:
            calls.append((args, named))

        handle = self.module.register_forward_pre_hook(keep, with_kwargs=True)
        with torch.no_grad():
            model(**inputs)
        handle.remove()
        self.args, self.named = calls[0]
        self.plain = self._run()
        self.once = all(self.plain.calls.count(self._inner(each)) == 1 for each in (reader, *writers))
        self.stream = torch.Generator().manual_seed(0)

    def _inner(self, name: str) -> str:
        return name[len(self.name) + 1 :]

    def _run(self, module: nn.Module | None = None, **change: Any) -> Probe:
        names = [self._inner(name) for name in (self.reader, *self.writers)]
        changed = {self._inner(name): function for name, function in change.items()}
        return Probe(change=changed).run(module or self.module, names, *self.args, **self.named)

    def _noise(self, output: Tensor) -> Tensor:
        drawn = torch.randn(output.shape, generator=self.stream).to(output)
        return (1 + 3 * output.std()) * drawn

    def _changed_inputs(self, change: Mapping[str, Any]) -> Tensor | None:
        """Which numbers the reader reads otherwise when outputs of writers are changed, (..., width) bool."""
        inner = self._inner(self.reader)
        before, after = self.plain.read.get(inner), self._run(**change).read.get(inner)
        if before is None or after is None or before.shape != after.shape or before.dim() < 2:
            return None
        return before != after

    def attends(self) -> bool:
        """Whether what is made of one token is read at others."""

        def first(output: Tensor) -> Tensor:
            changed = output.clone()
            changed[..., 0, :] += self._noise(output)[..., 0, :]
            return changed

        moved = self._changed_inputs(dict.fromkeys(self.writers, first))
        return moved is not None and bool(moved[..., 1:, :].any())

    def heads(self, shapes: Mapping[str, tuple[int, int]]) -> HeadLayout | None:
        """The largest number of heads that probes show to be independent; None if there are not even two."""
        width = shapes[self.reader][1]
        for count in (n for n in range(width, 1, -1) if width % n == 0):
            found = [(name, self._rows(name, shapes[name][0], count, width // count)) for name in self.writers]
            proven = [(name, sizes) for name, sizes in found if sizes is not None]
            if len(proven) == len(found) and all(
                self._is_independent(name, sizes, count, number) for name, sizes in proven for number in range(1, count)
            ):
                return HeadLayout(self.name, self.reader, tuple(proven), count, width // count)
        return None

    def _rows(self, name: str, rows: int, count: int, size: int) -> tuple[int, ...] | None:
        """How the rows of a layer belong to heads, if the first one is kept apart so."""
        of_one, rest = divmod(rows, count)
        if rest:
            return None
        ways = [(of_one,), *(((of_one // n,) * n) for n in (2, 3) if of_one % n == 0)]
        if of_one > size and (of_one - size) % 2 == 0:
            ways.append((size, (of_one - size) // 2, (of_one - size) // 2))  # more queries than keys
        return next((sizes for sizes in dict.fromkeys(ways) if self._is_independent(name, sizes, count, 0)), None)

    def _is_independent(self, name: str, sizes: tuple[int, ...], count: int, number: int) -> bool:
        """Whether changing one head's rows of a layer changes what is read of this head alone."""
        rows = head_of_each_row(sizes, count) == number
        moved = self._changed_inputs({name: lambda output: output + self._noise(output) * rows.to(output)})
        if moved is None:
            return False
        heads = moved.flatten(0, -2).any(0).unflatten(0, (count, -1)).any(1)  # (count,)
        return bool(heads[number]) and int(heads.sum()) == 1

    # -- whether it runs with fewer ------------------------------------------------------------------

    def equals_gated(
        self,
        heads: HeadLayout,
        fraction: float,
        config: Mapping[str, int] | None = None,
        built: nn.Module | None = None,
    ) -> bool:
        """Whether the module without some heads gives the same output as with these heads set to zero.

        Args:
            heads: its heads.
            fraction: of the heads, to be removed.
            config: what is set in its configuration.
            built: the module as its class builds it with that configuration.
        """
        kept = range(int(fraction * heads.count), heads.count)
        gated, fewer = copy.deepcopy(self.module), copy.deepcopy(self.module)
        reader: Any = gated.get_submodule(self._inner(self.reader))
        with torch.no_grad():
            dense_weight(reader)[:, : kept.start * heads.size] = 0
        try:
            heads.cut(list(kept)).apply(fewer)
            if built is not None:
                take_over(fewer, built)
            configure(fewer, config or {})
            wanted, found = self._run(gated).result, self._run(fewer).result
        except Exception:  # whatever a model's own code raises: it cannot do with fewer
            return False
        assert wanted is not None
        assert found is not None
        if wanted.shape != found.shape:
            return False
        return bool((wanted - found).abs().amax() <= CLOSE * wanted.abs().amax())


def take_over(module: nn.Module, built: nn.Module) -> None:
    """Give an attention the whole-number attributes of one that its class has built from the configuration.

    Raises:
        ValueError: if its matrices are of other shapes.
    """
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if {name: tensor.shape for name, tensor in built.state_dict().items()} != shapes:
        raise ValueError("other shapes")
    for name, source in built.named_modules():
        target = module.get_submodule(name)
        for key, value in vars(source).items():
            if type(value) is int:
                setattr(target, key, value)
    forget_pruned_heads(module)


def configure(module: nn.Module, config: Mapping[str, int]) -> None:
    """Set keys in every configuration that the module and those inside it read."""
    found = (getattr(inner, "config", None) for inner in module.modules())
    for each in {id(each): each for each in found if each is not None}.values():
        for key, value in config.items():
            setattr(each, key, value)
