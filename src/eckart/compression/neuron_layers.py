"""Which feed-forward layers may lose neurons, and what that means for their weights in a plan."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.allocation import Choice, Curve, Option, RankMultiples
from eckart.calibration.forward_context import forward_context
from eckart.calibration.layerwise import all_blocks, block_of
from eckart.compression.curves import Cost, Shapes
from eckart.errors import UsageError
from eckart.forms import Sliced
from eckart.model import Site, WeightLoader, forget_slicing, fuse_experts, replace_module, shared_clone
from eckart.model.config_sizes import find_config_sizes
from eckart.model.neurons import NeuronLayer, find_neurons, sliced_layers

SLICED = Sliced.form

EXPERT_MULTIPLE = 8
"""Numbers in 16 bytes of half precision."""

Layers = Sequence[NeuronLayer]


def find_layers(model: nn.Module, sites: Sequence[Site], inputs: Mapping[str, Tensor], weights: WeightLoader) -> Layers:
    """Every layer whose neurons can be taken away, all of whose weights are among the sites.

    Args:
        model: holds them.
        sites: the weights that may change.
        inputs: a small batch.
        weights: brings the weights of a part of the model to where they compute.
    """
    with forward_context(model, weights, all_blocks(model))(None):
        there = {key: value.to(weights.device) for key, value in inputs.items()}
        return find_neurons(model, sites, there, weights.held)[0]


def possible_layers(sites: Sequence[Site], model: nn.Module) -> list[tuple[str, ...]]:
    """Layers of neurons that there may be, before the model has run: reader, then writers.

    The reader goes back to as many numbers as the writers read, from as many as they make, or half as many.
    """
    blocks: dict[str | None, list[Site]] = {}
    for site in sites:
        blocks.setdefault(block_of(site.name, model), []).append(site)
    found: list[tuple[str, ...]] = []
    for inside in blocks.values():
        for place, reader in enumerate(inside):
            outputs, width = reader.shape
            around = reader.name.rpartition(".")[0].rpartition(".")[0]
            writers = [
                site.name
                for site in inside[:place]
                if site.in_features == outputs
                and site.out_features in (width, 2 * width)
                and outputs != width
                and site.name.startswith(around)
            ]
            if writers:
                found.append((reader.name, *writers))
    return found


def sliced_choices(layer: NeuronLayer, shapes: Shapes, count: int) -> dict[str, Choice]:
    """The choices of a layer's weights when `count` neurons are kept; those that make them name the one that reads."""
    choices = {layer.reader: Choice(SLICED, count, (shapes[layer.reader][0], 1))}
    for name in layer.writers:
        rows, columns = shapes[name]
        choices[name] = Choice(SLICED, count, (rows // layer.width, columns), basis=layer.reader)
    return choices


def counts(
    layer: NeuronLayer, shapes: Shapes, multiples: RankMultiples, largest: int | None = None, *, stock: bool = False
) -> Sequence[int]:
    """Numbers of neurons to choose from, up to the largest; by default all that leave one out at least."""
    found = multiples.ranks(shapes[layer.reader], SLICED, layer.width - 1 if largest is None else largest)
    if stock and any("expert" in part for part in layer.reader.split(".")):
        # transformers computes fused experts in one product, which takes rows of 16 bytes alone.
        return [count for count in found if count % EXPERT_MULTIPLE == 0]
    return found


def sliced_curve(
    layers: Layers,
    shapes: Shapes,
    losses: Mapping[NeuronLayer, Tensor],
    multiples: RankMultiples,
    cost: Cost,
    *,
    stock: bool = False,
) -> Curve:
    """All sizes that layers of one width can have together, each with the predicted loss of all of them.

    Args:
        layers: one, or several that are to keep as many neurons each.
        shapes: of all sites.
        losses: (w + 1,) of each layer, at 0, 1, ... neurons.
        multiples: of the number of neurons.
        cost: of choices.
        stock: only sizes that transformers alone computes.
    """
    points: dict[float, tuple[float, Option]] = {}
    for count in counts(layers[0], shapes, multiples, stock=stock):
        choices = {name: c for layer in layers for name, c in sliced_choices(layer, shapes, count).items()}
        each = {layer.reader: float(losses[layer][count]) for layer in layers}
        points[cost(choices)] = sum(each.values()), Option(choices, each)
    ordered = sorted(price for price in points if price < math.inf)
    return Curve([points[price][1] for price in ordered], ordered, [points[price][0] for price in ordered])


def by_width(layers: Iterable[NeuronLayer]) -> list[Layers]:
    """The layers of each width."""
    ordered = sorted(layers, key=lambda layer: layer.width)
    return [list(group) for _, group in groupby(ordered, key=lambda layer: layer.width)]


def names_of(layers: Iterable[NeuronLayer]) -> tuple[str, ...]:
    """All weights of some layers."""
    return tuple(name for layer in layers for name in layer.names)


def check_planned(choices: Mapping[str, Choice], layers: Collection[NeuronLayer], where: str) -> None:
    """Refuse a plan that slices weights that are not the reader and the writers of one layer.

    Raises:
        UsageError: naming the site.
    """
    known = {layer.reader: layer for layer in layers}
    for name, choice in choices.items():
        if choice.form != SLICED:
            continue
        layer = known.get(choice.basis or name)
        if layer is None or name not in layer.names:
            raise UsageError(
                f"{where}: site {name}: form sliced takes neurons away, and no trial of the model shows that "
                f"{choice.basis or name} reads any that can go. Use another form there."
            )
        for other in layer.names:
            made = choices.get(other, Choice("dense"))
            if made.form != SLICED or made.rank != choice.rank or (made.basis or other) != layer.reader:
                raise UsageError(
                    f"{where}: site {other}: {layer.reader} keeps {choices[layer.reader].rank} neurons, and "
                    f"{', '.join(layer.writers)} make them: give all of them form sliced with that rank"
                    f"{'' if other == layer.reader else f' and basis {layer.reader!r}'}."
                )


# -- one size for all: what stock transformers loads -------------------------------------------------


def check_stock(model: PreTrainedModel, layers: Layers) -> None:
    """Refuse a model whose configuration has no number for the width of its feed-forward layers.

    Raises:
        UsageError: saying so.
    """
    empty = shared_clone(model).to("meta")  # type: ignore[arg-type]
    narrower = {layer.width: max(1, layer.width // 2) for layer in layers}
    for layer in layers:
        old = {name: empty.get_submodule(name) for name in layer.names}
        for name, module in sliced_layers(old, layer, torch.arange(narrower[layer.width])).items():
            replace_module(empty, name, module)
    if not layers or _sizes(empty, narrower) is None:
        why = "no feed-forward layer of it can lose neurons" if not layers else (
            "no number of its configuration says how wide its feed-forward layers are"
        )  # fmt: skip
        raise UsageError(
            f"--stock: {type(model).__name__}: {why}, so that transformers alone could not load fewer neurons. Leave "
            "--stock out: eckart loads the result."
        )


def make_stock(model: PreTrainedModel, layers: Layers, choices: Mapping[str, Choice]) -> None:
    """Let the configuration say the width of layers that were sliced, in place: nothing of eckart is needed then.

    Args:
        model: with smaller layers in place.
        layers: all that may have lost neurons.
        choices: as they are stored.

    Raises:
        UsageError: layers have several sizes, or the configuration cannot say it.
    """
    widths: dict[int, int] = {}
    for layer in layers:
        choice = choices[layer.reader]
        count = choice.rank if choice.form == SLICED else layer.width
        if widths.setdefault(layer.width, count) != count:
            raise UsageError(
                f"--stock: {layer.reader} keeps {count} of {layer.width} neurons, another layer {widths[layer.width]}; "
                "transformers alone loads one size for all. Leave --stock out, or give all layers one size."
            )
    changed = {before: now for before, now in widths.items() if now < before}
    config = _sizes(model, changed) if changed else {}
    if config is None:
        raise UsageError(
            f"--stock: no number of the configuration of {type(model).__name__} says how wide its feed-forward layers "
            "are. Leave --stock out: eckart loads the result."
        )
    for key, value in config.items():
        setattr(model.config, key, value)


def _sizes(model: PreTrainedModel, widths: Mapping[int, int]) -> dict[str, int] | None:
    forget_slicing(model)
    fuse_experts(model)
    return find_config_sizes(model, widths)
