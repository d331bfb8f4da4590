"""Attention heads: found by probing the model, and removed.

A head is a stretch of what a linear layer reads, and the rows of the layers that make queries, keys and values for it:
changing those rows changes this stretch and no other, at other tokens too. Where several heads read the same keys and
values, they go together. Which rows belong to which head is probed on a batch, not read off names; so is whether the
model's own code runs with fewer heads, and gives the output that it gives when the others are zero.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.forms.transformers_internals import copy_attention
from eckart.model import Site, head_of_each_row
from eckart.model.probe import Probe, probing
from eckart.recovery.pruning.attention import AttentionProbe, HeadLayout, configure, take_over


@dataclass(frozen=True)
class PrunableHeads:
    """What was found in a model.

    Attributes:
        heads: attentions whose heads can go.
        config: keys of the model's configuration that say how many stay; empty if each attention has to say it.
        left: attention -> why its heads are left.
    """

    heads: tuple[HeadLayout, ...]
    config: Mapping[str, int]
    left: Mapping[str, str]


def find_heads(
    model: PreTrainedModel,
    sites: Sequence[Site],
    inputs: Mapping[str, Tensor],
    fraction: float,
    taken: Collection[str] = (),
) -> PrunableHeads:
    """Every attention of which probes show that some heads can be removed.

    Args:
        model: in any mode; it is left as it was.
        sites: the linear layers that may take part.
        inputs: a small batch without labels.
        fraction: of each attention's heads that is to go, rounded down.
        taken: layers that are known to read something other than heads.
    """
    shapes = {site.name: site.shape for site in sites}
    names = list(shapes)
    tried: list[tuple[AttentionProbe, HeadLayout]] = []
    left: dict[str, str] = {}
    seen = set(taken)
    with probing(model):
        plain = Probe().run(model, names, **inputs)
        for place, reader in enumerate(plain.calls):
            parent, writers = _find_attention(reader, plain.calls[:place])
            if reader in seen or not writers or seen & set(writers):
                continue
            attention = AttentionProbe(model, parent, reader, writers, inputs)
            if not attention.attends():
                continue
            seen.add(reader)
            if plain.calls.count(reader) > 1 or not attention.once:
                left[parent] = "it, or a layer in it, is called more than once a pass"
                continue
            heads = attention.heads(shapes)
            if heads is None:
                left[parent] = "probes show no parts of its width that are independent"
            elif not _is_read_by_reader_alone(model, names, inputs, plain, heads):
                left[parent] = "what its parts are made of is read elsewhere too"
            elif not int(fraction * heads.count):
                left[parent] = f"{fraction:g} of {heads.count} (heads that share keys and values count once) is none"
            else:
                tried.append((attention, heads))
        config = _find_config_keys(model, tried, fraction)
        if config:
            return PrunableHeads(tuple(heads for _, heads in tried), config, left)
        return PrunableHeads(tuple(_follow_attributes(tried, fraction, left)), {}, left)


def magnitudes(model: nn.Module, heads: HeadLayout, weight: Any) -> Tensor:
    """A proxy of what each head matters, (count,): norm of its columns times the norm of its rows.

    Args:
        model: that has them.
        heads: of one attention.
        weight: (model, layer) -> its weight, (out, in).
    """
    reader = weight(model, heads.reader).float()
    columns = reader.unflatten(1, (heads.count, heads.size)).norm(dim=(0, 2))
    rows = torch.zeros_like(columns)
    for name, sizes in heads.writers:
        made = weight(model, name).float().square().sum(1)
        rows.index_add_(0, head_of_each_row(sizes, heads.count).to(made.device), made)
    return columns * rows.sqrt()


def remove_heads(model: PreTrainedModel, kept: Mapping[HeadLayout, Tensor], config: Mapping[str, int]) -> None:
    """Take heads out of their attentions, and say so: in the model's configuration, or at each attention, in place.

    Args:
        model: with dense modules at all sites.
        kept: attention -> (count,) bool.
        config: as in :class:`PrunableHeads`.
    """
    for heads, mask in kept.items():
        heads.cut(mask.nonzero().flatten().tolist()).apply(model.get_submodule(heads.module))
    if not config:
        return
    built = _build_on_meta(model, config)
    assert built is not None
    for heads in kept:
        take_over(model.get_submodule(heads.module), built.get_submodule(heads.module))
    configure(model, config)


# -- which rows belong to which head ----------------------------------------------------------------------


def _find_attention(reader: str, before: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The smallest module around a layer in which others are called before it, and those."""
    parent = reader
    while parent := parent.rpartition(".")[0]:
        inside = tuple(name for name in dict.fromkeys(before) if name.startswith(f"{parent}."))
        if inside:
            return parent, inside
    return "", ()


def _is_read_by_reader_alone(
    model: nn.Module, names: list[str], inputs: Mapping[str, Tensor], plain: Probe, heads: HeadLayout
) -> bool:
    """Whether what is made for the heads reaches the model's result by their reader alone."""
    stream = torch.Generator().manual_seed(0)

    def every(output: Tensor) -> Tensor:
        return output + (1 + 3 * output.std()) * torch.randn(output.shape, generator=stream).to(output)

    change = {name: every for name, _ in heads.writers}
    expected = {heads.reader: plain.read[heads.reader]}
    around = Probe(change=change, replaced=expected).run(model, names, **inputs)
    assert around.result is not None
    assert plain.result is not None
    return torch.equal(around.result, plain.result)


# -- how it is said that there are fewer --------------------------------------------------------------------


def _find_config_keys(
    model: PreTrainedModel, tried: Sequence[tuple[AttentionProbe, HeadLayout]], fraction: float
) -> dict[str, int]:
    """Keys of the configuration with which the model's class builds all these attentions; {} if there are none."""
    counts = {heads.count for _, heads in tried}
    if len(counts) != 1:
        return {}
    (count,) = counts
    left = count - int(fraction * count)
    sizes = {number for _, heads in tried for number in (count, count * heads.each)}
    content = vars(model.config)
    keys = [key for key, value in content.items() if "head" in key and type(value) is int and value in sizes]
    for some in filter(None, _subsets(keys)):
        config = {key: content[key] * left // count for key in some}
        built = _build_on_meta(model, config)
        if (
            built is not None
            and _shapes_outside(built, tried) == _shapes_outside(model, tried)
            and all(
                attention.equals_gated(heads, fraction, config, built.get_submodule(heads.module))
                for attention, heads in tried
            )
        ):
            return config
    return {}


def _shapes_outside(model: nn.Module, tried: Sequence[tuple[AttentionProbe, HeadLayout]]) -> dict[str, torch.Size]:
    """Shapes of all tensors that are not in these attentions; those outside stay as they are."""
    inside = tuple(f"{heads.module}." for _, heads in tried)
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.shape for name, tensor in tensors if not name.startswith(inside)}


def _build_on_meta(model: PreTrainedModel, changes: Mapping[str, int]) -> PreTrainedModel | None:
    """The model's class without numbers, from a configuration that was written and read."""
    try:
        config = type(model.config).from_dict({**model.config.to_dict(), **changes})
        copy_attention(config, model.config)
        with torch.device("meta"):
            return type(model)(config)
    except Exception:  # a number that this class cannot be built with is not the one
        return None


def _follow_attributes(
    tried: Sequence[tuple[AttentionProbe, HeadLayout]], fraction: float, left: dict[str, str]
) -> Iterator[HeadLayout]:
    """Attentions that run with fewer heads once some of their attributes follow; the others are put in `left`."""
    known: dict[type, tuple[str, ...] | None] = {}
    for attention, heads in tried:
        kind = type(attention.module)
        numbers = _candidate_attributes(attention.module, heads)
        for names in [known[kind]] if kind in known else _attribute_choices(list(numbers)):
            if names is None:
                continue
            followed = replace(heads, numbers=tuple((name, numbers[name]) for name in names))
            if attention.equals_gated(followed, fraction):
                known[kind] = names
                yield followed
                break
        else:
            known.setdefault(kind, None)
            left[heads.module] = "with fewer heads its code does not do what it does without their output"


def _candidate_attributes(module: nn.Module, heads: HeadLayout) -> dict[str, int]:
    """Attributes that may follow the number of heads: whole numbers of the size of something that shrinks."""
    rows = [size * heads.count for _, sizes in heads.writers for size in (*sizes, sum(sizes))]
    sizes = {heads.count, heads.count * heads.each, heads.count * heads.size, *rows}
    return {
        f"{name}.{key}" if name else key: value
        for name, inner in module.named_modules()
        if not isinstance(inner, nn.Linear | Conv1D)
        for key, value in vars(inner).items()
        if type(value) is int and value in sizes
    }


def _attribute_choices(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Which attributes to try: all that are named after heads before fewer of them, and as few others as will do."""
    named = [name for name in names if "head" in name.rpartition(".")[2]]
    others = [name for name in names if name not in named]
    for more in _subsets(others):
        for some in reversed(list(_subsets(named))):
            yield *some, *more


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The empty one first."""
    for size in range(len(names) + 1):
        yield from combinations(names, size)
