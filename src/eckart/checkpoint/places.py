"""What a description of ``config.json`` names, found or built on the empty model of a class."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.errors import CheckpointError, UsageError
from eckart.forms import Factored, FactoredLinear, build
from eckart.forms.quantized import QuantizedLinear
from eckart.model import PrunedHeads, SlicedFeatures
from eckart.quantization.kinds import BITS


def locate(model: PreTrainedModel, name: str) -> str | None:
    """Where a module of the checkpoint is in this model class; None if it belongs to another head."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    for place in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(place)
        except AttributeError:
            continue
        return place
    first = name.removeprefix(prefix).partition(".")[0]
    own = type(model).__name__ in (model.config.architectures or ())
    if own or hasattr(model, first) or hasattr(model.base_model, first):
        raise CheckpointError(
            f"quantization_config.modules in config.json names {name}, which {type(model).__name__} does "
            "not have. Load the model with the class in config.architectures, or download config.json "
            "again."
        )
    return None


def take_heads_out(model: PreTrainedModel, name: str, spec: dict[str, Any]) -> None:
    """Take heads out of an attention on the empty model."""
    place = locate(model, name)
    if place is None:
        return
    try:
        PrunedHeads.from_spec(spec).apply(model.get_submodule(place))
    except UsageError as error:
        raise CheckpointError(
            f"Module {name} in quantization_config of config.json: {error} Load the model with the config and the "
            "transformers that it was saved with, or a newer eckart: pip install -U eckart"
        ) from error


def take_neurons_out(model: PreTrainedModel, name: str, spec: dict[str, Any]) -> None:
    """Give a linear layer on the empty model the number of neurons that it has in the checkpoint."""
    place = locate(model, name)
    if place is None:
        return
    try:
        model.set_submodule(place, SlicedFeatures.from_spec(spec).apply(model.get_submodule(place)))
    except UsageError as error:
        raise CheckpointError(
            f"Module {name} in quantization_config of config.json: {error} Load the model with the config and the "
            "transformers that it was saved with, or a newer eckart: pip install -U eckart"
        ) from error


def located_ties(model: PreTrainedModel, ties: dict[str, str]) -> dict[str, str]:
    """Ties by the names that this model class has; those of another head are left out."""
    found: dict[str, str] = {}
    for pair in ties.items():
        places = []
        for name in pair:
            module, _, key = name.rpartition(".")
            place = locate(model, module)
            if place is not None and model.get_submodule(place)._parameters.get(key) is None:
                raise CheckpointError(
                    f"quantization_config.ties in config.json names {name}, but {place} has no parameter {key!r}. "
                    "Download config.json again."
                )
            places.append(f"{place}.{key}" if place is not None else None)
        target, source = places
        if target is None and source is None:
            continue
        shapes = [tuple(model.get_parameter(place).shape) for place in places if place is not None]
        if target is None or source is None or shapes[0] != shapes[1]:
            raise CheckpointError(
                f"quantization_config.ties in config.json says that {pair[0]} is {pair[1]}, but their shapes are "
                f"{' and '.join(map(str, shapes))}. Load the model with the class in config.architectures, or download "
                "config.json again."
            )
        found[target] = source
    return found


def same_place(model: PreTrainedModel, one: str, other: str) -> bool:
    """Whether two names differ by the base model's prefix at most."""
    prefix = f"{model.base_model_prefix}."
    return one.removeprefix(prefix) == other.removeprefix(prefix)


def built(name: str, spec: dict[str, Any], dense: nn.Module) -> Factored:
    """The form that a spec describes, of the shape of the module that it replaces."""
    try:
        form = build(spec)
    except UsageError as error:
        raise CheckpointError(
            f"Module {name} in quantization_config of config.json cannot be built: {error} A newer eckart "
            "may know it: pip install -U eckart"
        ) from error
    weight = getattr(dense, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, nn.Parameter) else None
    if isinstance(form, FactoredLinear):
        rows, columns = form.out_features, form.in_features
    else:
        rows, columns = form.weight.shape  # type: ignore[misc]
    if shape is None or sorted(shape) != sorted((rows, columns)):
        raise CheckpointError(
            f"Module {name} in quantization_config of config.json is {rows} x "
            f"{columns}, but {type(dense).__name__} there has the shape {shape}. Load the model "
            "with the config it was saved with."
        )
    return form


def quantized(name: str, kind: str, spec: dict[str, Any], dense: nn.Module) -> QuantizedLinear:
    """The empty quantized layer that stands for a linear one of the empty model."""
    source = "conv1d" if isinstance(dense, Conv1D) else "linear"
    if type(dense) not in (nn.Linear, Conv1D) or spec.get("source", "linear") != source:
        raise CheckpointError(
            f"quantization_config.quantization in config.json names {name}, but that is a {type(dense).__name__}. Load "
            "the model with the config and the transformers that it was saved with."
        )
    weight = dense.get_parameter("weight")
    rows, columns = weight.shape[::-1] if source == "conv1d" else weight.shape
    group = spec.get("group")
    try:
        with weight.device:
            return QuantizedLinear(
                columns, rows, dense.bias is not None, bits=BITS[kind], dynamic=kind == "int8-dynamic", group=group,
                source=source, dtype=weight.dtype,
            )  # fmt: skip
    except UsageError as error:
        raise CheckpointError(
            f"quantization_config.quantization in config.json, layer {name}: {error} Download config.json again."
        ) from error
