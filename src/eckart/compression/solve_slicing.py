"""Take neurons of a feed-forward layer away, by the statistics of the weight that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.compression.settings import Settings
from eckart.forms.base import copy_into
from eckart.linalg import Slicing, slice_by_leverage, slice_neurons, slicing_curve_under
from eckart.linalg.blocks import blocks
from eckart.model import Site, SlicedFeatures, dense_weight
from eckart.model.neurons import NeuronLayer, sliced_layers
from eckart.moments import Moments


@dataclass(frozen=True)
class SlicedLayer:
    """The neurons of a layer in the order in which they are worth keeping, with the corrections of every size.

    Attributes:
        layer: its reader and writers.
        slicing: the order and the corrections, up to the largest number that may be kept.
        losses: (w + 1,) predicted change of the loss with 0, 1, ..., w neurons; None where it is not asked for.
        mean: (w,) E[h] of the neurons, where the reader's bias absorbs it.
    """

    layer: NeuronLayer
    slicing: Slicing
    losses: Tensor | None = None
    mean: Tensor | None = None

    @property
    def notes(self) -> list[str]:
        """Fallbacks."""
        return list(self.slicing.notes)

    def serialize(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return named tensors and JSON values, as a store keeps them; of the triangle only what is not zero."""
        solved = self.slicing
        tensors = {"order": solved.order, "mixed": solved.mixed, "squared": solved.squared}
        for number, part in enumerate(blocks(solved.limit)):
            tensors[f"lower.{number}"] = solved.lower[part, : part.stop].contiguous()
        if self.losses is not None:
            tensors["losses"] = self.losses
        if self.mean is not None:
            tensors["mean"] = self.mean
        layer = self.layer
        described = {"reader": layer.reader, "writers": list(layer.writers), "width": layer.width}
        return tensors, {"layer": described | {"rows": list(map(list, layer.rows))}, "notes": self.notes}

    @classmethod
    def deserialize(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> SlicedLayer:
        """Rebuild what :meth:`serialize` returned."""
        mixed = tensors["mixed"]
        lower = mixed.new_zeros(mixed.shape[1], mixed.shape[1])
        for number, part in enumerate(blocks(len(lower))):
            lower[part, : part.stop] = tensors[f"lower.{number}"]
        slicing = Slicing(tensors["order"], mixed, lower, tensors["squared"], tuple(content["notes"]))
        return cls(layer_of(content["layer"]), slicing, tensors.get("losses"), tensors.get("mean"))

    def modules(self, model: nn.Module, count: int, dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
        """The smaller layers, by name.

        Args:
            model: holds the layers in full size; it is not changed.
            count: neurons that are kept.
            dtype: type of the stored numbers; None for that of each layer.

        Raises:
            UsageError: if a corrected number does not fit the type.
        """
        kept, weight = self.slicing.corrected(count)
        old: dict[str, Any] = {name: model.get_submodule(name) for name in self.layer.names}
        reader = old[self.layer.reader]
        made: dict[str, Any] = dict(sliced_layers(old, self.layer, kept))
        bias = None
        if self.mean is not None and reader.bias is not None:
            # The metric was the covariance, so the error of the mean output is corrected in the bias.
            mean = self.mean.to(weight)
            rest = dense_weight(reader).to(weight) @ mean - weight @ mean[kept]
            bias = reader.bias.detach().to(weight) + rest
        fill(made[self.layer.reader], weight, bias, dtype, self.layer.reader)
        for name in self.layer.writers:
            if dtype is not None:
                made[name] = made[name].to(dtype)
        for name, module in made.items():
            features_of(self.layer, name, count).mark(module.eval())
        return made


def features_of(layer: NeuronLayer, name: str, count: int) -> SlicedFeatures:
    """What is noted on one of a layer's modules when `count` neurons are kept."""
    rows = () if name == layer.reader else layer.rows[layer.writers.index(name)]
    return SlicedFeatures(layer.width, count, rows)


def layer_of(content: Mapping[str, Any]) -> NeuronLayer:
    """The layer that JSON values describe."""
    rows = tuple(tuple(each) for each in content["rows"])
    return NeuronLayer(content["reader"], tuple(content["writers"]), content["width"], rows)


def fill(module: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None, what: str) -> None:
    """Round a weight (out, in), and a bias, into a layer, which is given tensors of its own.

    Args:
        module: a Linear or Conv1D.
        weight: of its size.
        bias: None to keep the one that is there.
        dtype: type of the stored numbers; None for that of the layer.
        what: its name, for messages.

    Raises:
        UsageError: if a number does not fit the type.
    """
    old = module.weight
    oriented = weight.mT if isinstance(module, Conv1D) else weight
    new = torch.empty(oriented.shape, dtype=dtype or old.dtype, device=old.device)
    copy_into(new, oriented, f"{what}: corrected weight")
    module.weight = nn.Parameter(new, requires_grad=bool(old.requires_grad))
    bias = module.bias if bias is None else bias
    if bias is not None:
        held = torch.empty(bias.shape, dtype=dtype or old.dtype, device=old.device)
        copy_into(held, bias, f"{what}: bias")
        module.bias = nn.Parameter(held, requires_grad=bool(old.requires_grad))


def solve_slicing(
    layer: NeuronLayer, site: Site, weight: Tensor, moments: Moments | None, settings: Settings, limit: int, *,
    curve: bool,
) -> SlicedLayer:  # fmt: skip
    """Order the neurons of a layer by what they are worth.

    Args:
        layer: its reader and writers.
        site: the reader.
        weight: of the reader, (out, w).
        moments: of the reader, if the method reads any.
        settings: the method.
        limit: the largest number of neurons that may be kept.
        curve: whether the predicted loss of every number is wanted.
    """
    if moments is not None:
        moments.centered = settings.method.centered and site.has_bias
    problem = settings.method.metric(weight, moments)  # type: ignore[arg-type]
    solved = (slice_by_leverage if settings.method.by_leverage else slice_neurons)(problem, site.name)
    losses = None
    if curve and moments is not None:
        metric = settings.loss_metric
        measured = settings.method.metric is metric
        errors = solved.curve if measured else slicing_curve_under(solved, metric(weight, moments))
        losses = 0.5 * moments.tokens / max(moments.sequences, 1) * errors
    mean = moments.mean if moments is not None and moments.centered else None
    return SlicedLayer(layer, solved.kept(limit), losses, mean)
