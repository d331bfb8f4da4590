"""Value heads whose width a number of the model's configuration says: found by trial, and narrowed.

Where the values of a head may have another size than its queries and keys, a class builds with another number of its
configuration a model in which only the rows of the layers that make values are fewer, and only the columns of the
layers that read them. Which rows these are, that what is read is linear in them head by head, that nothing else reads
them, and that the class with that number computes what it should, is tried on a batch; no name of an architecture is
looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.errors import UsageError
from eckart.forms.base import copy_into
from eckart.model.attention_heads import select_features
from eckart.model.clone import shared_clone
from eckart.model.neurons import is_near, set_columns_to_zero
from eckart.model.probe import Probe, probing
from eckart.model.replace import replace_module
from eckart.model.sites import Site, dense_weight

LAYOUTS = ((True, True), (True, False), (False, True), (False, False))
"""Where the rows of values are among others: in each head's part or in one part of all, at its end or its start."""


@dataclass(frozen=True)
class ValueHeads:
    """The value heads of one attention.

    Attributes:
        reader: the linear layer that reads them, (out, heads width).
        writer: the one some of whose rows make them.
        width: d, numbers of one head.
        heads: how many are read.
        made: how many are made: a divisor of `heads`, each is read by as many neighbours.
        each: whether the writer's rows are head by head, so that values are in the part of each head; else all of them
            are in one part.
        last: whether they are at the end of that part.
    """

    reader: str
    writer: str
    width: int
    heads: int
    made: int
    each: bool = True
    last: bool = True

    def changed(self, rows: Tensor, directions: Tensor) -> Tensor:
        """Rows of the writer, (rows, n), with P_h v_h (r numbers) in place of the values v_h (d) of each head.

        Args:
            rows: its weight, its bias as (rows, 1), or its output as (rows, tokens).
            directions: P, (made, r, d).
        """
        parts = rows.unflatten(0, (self.made if self.each else 1, -1))
        count = self.made * self.width // len(parts)
        places = [parts.shape[1] - count, count]
        others, values = parts.split(places, 1) if self.last else reversed(parts.split(places[::-1], 1))
        turned = directions.to(values) @ values.reshape(self.made, self.width, -1)
        turned = turned.reshape(len(parts), -1, rows.shape[1])
        return torch.cat([others, turned] if self.last else [turned, others], 1).flatten(0, 1)

    def read(self, inputs: Tensor, directions: Tensor) -> Tensor:
        """What the reader reads then, (..., heads r), of its inputs (..., heads d)."""
        shared = directions.to(inputs).repeat_interleave(self.heads // self.made, 0)
        each = inputs.unflatten(-1, (self.heads, self.width))
        return torch.einsum("...hd,hrd->...hr", each, shared).flatten(-2)


@dataclass(frozen=True)
class HeadWidth:
    """A number of the configuration, and the heads whose width it says.

    Attributes:
        key: of the configuration.
        width: its value.
        layers: one of each attention.
    """

    key: str
    width: int
    layers: tuple[ValueHeads, ...]


def possible_head_widths(model: PreTrainedModel, sites: Sequence[Site]) -> list[HeadWidth]:
    """Numbers of the configuration that change rows and columns as the width of value heads does.

    Nothing is computed: the class is built without memory, once for each number.

    Args:
        model: as its class builds it.
        sites: its linear layers.

    Raises:
        UsageError: its weights have other names or shapes than its class gives them.
    """
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if before != _shapes_built(model, {}):
        raise UsageError(
            f"{type(model).__name__}: its weights are not those that its class builds from its configuration. Narrow "
            "the value heads of a model before anything else of it is compressed."
        )
    found = []
    for key, value in vars(model.config).items():
        if type(value) is int and value > 1:
            after = _shapes_built(model, {key: value // 2})
            layers = _pairs(before, after, sites, value) if after is not None and after.keys() == before.keys() else ()
            if layers:
                found.append(HeadWidth(key, value, layers))
    return found


def find_head_width(model: PreTrainedModel, possible: Sequence[HeadWidth], inputs: Mapping[str, Tensor]) -> HeadWidth:
    """The number that says the width of value heads, proven by probes.

    Args:
        model: in any mode; it is left as it was.
        possible: of :func:`possible_head_widths`.
        inputs: a small batch without labels.

    Raises:
        UsageError: there is none, and why.
    """
    why = (
        "with another number in its configuration no layers have fewer rows and others fewer columns, head by head, "
        "and all else stays: its code has no size of values of its own"
    )
    with probing(model):
        for one in possible:
            tried, left = _proven(model, one.layers, inputs)
            if tried is None:
                why = f"config.{one.key}: {left}"
            elif not _runs_narrower(model, proven := replace(one, layers=tried), inputs):
                why = f"config.{one.key}: with a smaller one its code does not do what it does when values are zero"
            else:
                return proven
    raise UsageError(f"{type(model).__name__}: no value heads of another width: {why}.")


def narrowed_model(
    model: PreTrainedModel, found: HeadWidth, width: int, solved: Mapping[str, tuple[Tensor, Tensor, Tensor | None]]
) -> PreTrainedModel:
    """A model of the same class with narrower value heads, as its configuration then says.

    Args:
        model: it is not changed; what does not change is shared with it.
        found: the number, and the heads.
        width: r, of all heads.
        solved: reader -> P (made, r, d), the reader's weight (out, heads r), and its bias or None to keep it.

    Raises:
        UsageError: if a number does not fit the type of the model.
    """
    new = shared_clone(model)
    setattr(new.config, found.key, width)
    for layer in found.layers:
        for name, module in _narrowed_layers(model, layer, *solved[layer.reader]).items():
            replace_module(new, name, module)
    # What modules have noted of the number when they were made.
    wide, narrow = (dict(_built(model, {found.key: value}).named_modules()) for value in (found.width, width))
    for name, module in new.named_modules():
        for key, value in vars(narrow[name]).items():
            if isinstance(value, int | float) and value != vars(wide[name]).get(key):
                setattr(module, key, value)
    return new


# -- numbers of the configuration ----------------------------------------------------------------------


def _built(model: PreTrainedModel, changes: Mapping[str, int]) -> PreTrainedModel:
    """What the model's class builds with some numbers changed, without memory."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        return type(model)(config)


def _shapes_built(model: PreTrainedModel, changes: Mapping[str, int]) -> dict[str, torch.Size] | None:
    try:
        return {name: tensor.shape for name, tensor in _built(model, changes).state_dict().items()}
    except Exception:  # a number that this class cannot be built with is not the one
        return None


def _pairs(
    before: Mapping[str, torch.Size], after: Mapping[str, torch.Size], sites: Sequence[Site], width: int
) -> tuple[ValueHeads, ...]:
    """Each layer that lost rows with the next one that lost columns, if no other tensor changed."""
    changed = {name for name in before if before[name] != after[name]}
    lost = width - width // 2
    writers: list[tuple[Site, int]] = []
    readers: list[tuple[Site, int]] = []
    for site in sites:
        name = f"{site.name}.weight"
        if name not in changed:
            continue
        changed -= {name, f"{site.name}.bias"}
        rows, columns = after[name] if site.source == "linear" else reversed(after[name])
        missing = site.out_features - rows, site.in_features - columns
        if missing[0] > 0 and missing[1] == 0 and missing[0] % lost == 0:
            writers.append((site, missing[0] // lost))
        elif missing[0] == 0 and missing[1] > 0 and missing[1] % lost == 0:
            readers.append((site, missing[1] // lost))
        else:
            return ()
    if changed or len(writers) != len(readers):
        return ()
    paired = [
        ValueHeads(reader.name, writer.name, width, heads, made)
        for (writer, made), (reader, heads) in zip(writers, readers, strict=True)
        if reader.in_features == heads * width and heads % made == 0 and writer.out_features % made == 0
    ]
    return tuple(paired) if len(paired) == len(readers) else ()


# -- trials --------------------------------------------------------------------------------------------


def _proven(
    model: nn.Module, layers: Sequence[ValueHeads], inputs: Mapping[str, Tensor]
) -> tuple[tuple[ValueHeads, ...] | None, str]:
    """The layers with the places of their values, each shown by random matrices between values and reader; or why not.

    While they are tried the readers read what they always did, so that all layers are tried in one pass.
    """
    names = [name for layer in layers for name in (layer.writer, layer.reader)]
    plain = Probe().run(model, names, **inputs)
    twice = [name for name in names if plain.calls.count(name) != 1 or name not in plain.read]
    if twice:
        return None, f"{twice[0]} is not called just once a pass, with one tensor"
    stream = torch.Generator().manual_seed(0)
    mixing = {
        layer: torch.eye(layer.width) + torch.randn(layer.made, layer.width, layer.width, generator=stream)
        for layer in layers
    }
    proven: dict[str, ValueHeads] = {}
    for each, last in LAYOUTS:
        tried = {layer: replace(layer, each=each, last=last) for layer in layers if layer.reader not in proven}
        changes = {place.writer: _mixing(place, mixing[layer]) for layer, place in tried.items()}
        kept = {layer.reader: plain.read[layer.reader] for layer in layers}
        probe = Probe(change=changes, replaced=kept).run(model, names, **inputs)
        for layer, place in tried.items():
            expected = place.read(kept[layer.reader], mixing[layer])
            if is_near(probe.read[layer.reader], expected) and not is_near(kept[layer.reader], expected):
                proven[layer.reader] = place
                if not probe.gives(plain):
                    return None, f"the outputs of {layer.writer} reach the result by another way than {layer.reader}"
    missing = [layer for layer in layers if layer.reader not in proven]
    if missing:
        return None, f"what {missing[0].reader} reads is not linear in rows of {missing[0].writer}, head by head"
    return tuple(proven[layer.reader] for layer in layers), ""


def _mixing(layer: ValueHeads, directions: Tensor) -> Any:
    def change(output: Tensor) -> Tensor:
        flat = output.flatten(0, -2)
        return layer.changed(flat.mT, directions).mT.reshape(output.shape).contiguous()

    return change


def _runs_narrower(model: PreTrainedModel, found: HeadWidth, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the model with the first half of each head gives what it gives with the others at zero."""
    width = found.width // 2
    silent, solved = shared_clone(model), {}
    for layer in found.layers:
        old = model.get_submodule(layer.reader)
        weight = dense_weight(old)
        of_head = torch.arange(layer.heads * layer.width, device="cpu") % layer.width
        replace_module(silent, layer.reader, set_columns_to_zero(old, (of_head >= width).nonzero().flatten()))
        first = torch.eye(layer.width, dtype=torch.float64, device="cpu")[:width].expand(layer.made, -1, -1)
        solved[layer.reader] = (first, weight[:, of_head.to(weight.device) < width], None)
    try:
        narrow = narrowed_model(model, found, width, solved)
        made, wanted = (Probe().run(one, [], **inputs).results for one in (narrow, silent))
    except Exception:  # whatever a model's own code raises: it cannot do with less
        return False
    return [one.shape for one in made] == [one.shape for one in wanted] and all(map(is_near, made, wanted))


def _narrowed_layers(
    model: nn.Module, layer: ValueHeads, directions: Tensor, weight: Tensor, bias: Tensor | None
) -> dict[str, nn.Module]:
    reader: Any = model.get_submodule(layer.reader)
    writer: Any = model.get_submodule(layer.writer)
    rows = layer.changed(dense_weight(writer).double(), directions)
    new_reader: Any = select_features(reader, torch.arange(weight.shape[1], device="cpu"), rows=False)
    new_writer: Any = select_features(writer, torch.arange(len(rows), device="cpu"), rows=True)
    copy_into(dense_weight(new_reader), weight, f"{layer.reader}: corrected weight")
    copy_into(dense_weight(new_writer), rows, f"{layer.writer}: weight")
    if writer.bias is not None:
        turned = layer.changed(writer.bias.detach()[:, None].double(), directions)[:, 0]
        copy_into(new_writer.bias.data, turned, f"{layer.writer}: bias")
    if bias is not None:
        new_reader.bias = nn.Parameter(reader.bias.detach().clone(), requires_grad=reader.bias.requires_grad)
        copy_into(new_reader.bias.data, bias, f"{layer.reader}: bias")
    return {layer.reader: new_reader, layer.writer: new_writer}
