"""Store the weights of a model in few bits, in place; and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.errors import NumericalError, UsageError
from eckart.forms import FactoredLinear
from eckart.forms.base import number_type
from eckart.forms.quantized import QuantizedLinear
from eckart.model import (
    dense_weight,
    factored_modules,
    keep_slicing,
    replace_module,
    share_parameters,
    shared_parameters,
)
from eckart.model.sites import list_matrices
from eckart.quantization.kinds import BITS, GROUP, SMALLEST_GROUP, check_kind
from eckart.quantization.prepare import prepare

STORED = ("qdata", "scale")


@dataclass(frozen=True)
class Quantization:
    """What was done to a model.

    Attributes:
        kind: one of :data:`eckart.quantization.KINDS`.
        layers: names of the linear layers that are quantized, leaves of forms among them.
        left: name -> why another module with a matrix keeps its floating-point numbers.
        notes: lines for a report: what was converted, and what was left how often.
    """

    kind: str
    layers: tuple[str, ...]
    left: Mapping[str, str]
    notes: tuple[str, ...]


def quantize(model: PreTrainedModel, kind: str) -> Quantization:
    """Round the weights of factors, and of what stayed dense, in place; no data is read.

    Forms that would not survive are converted and all factors balanced before (:func:`prepare`). Rounded are the
    leaves of forms and every linear layer that could be factored. Embeddings, output heads, and what else holds
    matrices keep their numbers.

    Args:
        model: any model; tensors that a clone shares with it stay as they are.
        kind: one of :data:`KINDS`.

    Returns:
        What was rounded, and what was left and why.

    Raises:
        NumericalError: a weight is not finite.
        UsageError: the kind is unknown, torchao is missing, the model is quantized already or has adapters, or
            nothing in it can be rounded.
    """
    check_kind(kind)
    require_torchao()
    refuse_quantized(model)
    types = {name: number_type(module).dtype for name, module in factored_modules(model).items()}
    notes = prepare(model, kind, torch.float32)
    chosen, left = choose_layers(model, kind)
    if not chosen:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5])
        raise UsageError(
            f"{type(model).__name__}: no linear layer can be stored as {kind} ({listed or 'it has none'}). Leave "
            "--quantize out, or take int8."
        )
    ties = {target: source for target, source in shared_parameters(model).items() if _parent(target) in chosen}
    rounded: dict[int, tuple[Tensor, Tensor]] = {}
    for name, group in chosen.items():
        old = model.get_submodule(name)
        weight = old.weight
        if id(weight) not in rounded:
            rounded[id(weight)] = round_weight(dense_weight(old), group, name)
        integers, scale = rounded[id(weight)]
        source = "conv1d" if isinstance(old, Conv1D) else "linear"
        bias: Any = old.bias
        assert isinstance(weight, Tensor)
        computes = types.get(_parent(name), weight.dtype)
        layer = QuantizedLinear.of(
            integers, scale, bias, dynamic=kind == "int8-dynamic", group=group, source=source, dtype=computes
        )
        replace_module(model, name, keep_slicing(old, layer))
    share_parameters(model, {f"{_parent(t)}.{key}": f"{_parent(s)}.{key}" for t, s in ties.items() for key in STORED})
    for name, dtype in types.items():  # factors that were left are as wide as they were
        for leaf in model.get_submodule(name).children():
            if type(leaf) is nn.Linear:
                leaf.weight.data = leaf.weight.data.to(dtype)
    reasons = Counter(left.values())
    kept = [f"{count} x {reason}" for reason, count in reasons.most_common()]
    notes += [f"left as floating-point numbers: {'; '.join(kept)}"] if kept else []
    return Quantization(kind, tuple(chosen), left, tuple(notes))


def dequantize(model: nn.Module) -> nn.Module:
    """Turn every quantized layer into an ordinary one that holds the rounded numbers, in place.

    Returns:
        The same model; it computes what it computed, but for inputs that int8-dynamic rounds.
    """
    layers = quantized_layers(model)
    ties = {target: source for target, source in shared_parameters(model).items() if _parent(target) in layers}
    for name, layer in layers.items():
        replace_module(model, name, keep_slicing(layer, _ordinary(layer)))
    share_parameters(
        model, {f"{_parent(t)}.weight": f"{_parent(s)}.weight" for t, s in ties.items() if t.endswith(".qdata")}
    )
    return model


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Name -> quantized layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def kind_of(model: nn.Module) -> str | None:
    """How a model is quantized; None where it is not."""
    layer = next(iter(quantized_layers(model).values()), None)
    if layer is None:
        return None
    return "int4" if layer.bits == 4 else "int8-dynamic" if layer.dynamic else "int8"


def refuse_quantized(model: nn.Module) -> None:
    """Refuse a model that is quantized already.

    Raises:
        UsageError: it is.
    """
    kind = kind_of(model)
    foreign = getattr(model, "hf_quantizer", None) is not None
    if kind is not None or foreign:
        way = " or take its rounded numbers as floating-point ones first: eckart.dequantize(model)" if kind else ""
        raise UsageError(
            f"{type(model).__name__} is quantized already{f' ({kind})' if kind else ''}. Quantize the model that it "
            f"was made from,{way or ' which has floating-point numbers'}."
        )


def require_torchao() -> None:
    """Refuse to go on without torchao.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import torchao  # noqa: F401
    except ImportError:
        raise UsageError("--quantize needs torchao, which is not installed: pip install 'eckart[quant]'") from None


def choose_layers(model: nn.Module, kind: str) -> tuple[dict[str, int | None], dict[str, str]]:
    """The layers to round, each with the numbers of a row that share a scale (None: all); and why not the others."""
    inner = {
        f"{name}.{leaf}"
        for name, module in factored_modules(model).items()
        if isinstance(module, FactoredLinear)
        for leaf, part in module.named_modules()
        if type(part) is nn.Linear
    }
    found, left = list_matrices(model)
    chosen: dict[str, int | None] = {}
    for name, module in model.named_modules():
        if name not in inner and name not in found:
            continue
        if type(module) not in (nn.Linear, Conv1D):
            left[name] = f"{type(module).__name__}, a class of its own"
            continue
        left.pop(name, None)
        rows, columns = dense_weight(module).shape
        group = _group(columns) if BITS[kind] == 4 else None
        if BITS[kind] == 4 and group is None:
            left[name] = f"rows of {columns} numbers do not divide into groups of {SMALLEST_GROUP} to {GROUP}"
        elif _bytes(rows, columns, group) >= dense_weight(module).nbytes:
            left[name] = "so small that its scales would take more than rounding saves"
        else:
            chosen[name] = group
    return chosen, left


def round_weight(weight: Tensor, group: int | None, name: str) -> tuple[Tensor, Tensor]:
    """Integers and scales of a weight by torchao, symmetric, to nearest.

    In 8 bits a scale is that of the largest number of its row. In 4 bits it is fitted to most numbers of its group, as
    in half-quadratic quantization (Badri & Shaji, HQQ, 2023), and the largest may be cut.

    Args:
        weight: (m, n).
        group: numbers of a row that share a scale, in 4 bits; None for 8 bits and one scale a row.
        name: of the layer, for errors.

    Returns:
        (m, n) int8, and (m, 1) or (m, n / group).

    Raises:
        NumericalError: a number is not finite.
    """
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(f"{name}: its weight is not finite and cannot be rounded: mend the checkpoint.")
    numbers = weight.detach().float()
    if group is None:
        rounded = Int8Tensor.from_hp(numbers, granularity=PerRow())
        return rounded.qdata, rounded.scale
    narrow = IntxUnpackedToInt8Tensor.from_hp(
        numbers,
        (1, group),
        torch.int4,  # type: ignore[attr-defined]
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
    )
    return narrow.qdata, narrow.scale


def _group(columns: int) -> int | None:
    """The largest group that divides a row."""
    return next((size for size in range(GROUP, SMALLEST_GROUP - 1, -1) if columns % size == 0), None)


def _bytes(rows: int, columns: int, group: int | None) -> int:
    return rows * (columns + 4) if group is None else rows * (-(-columns // 2) + 2 * columns // group)


def _ordinary(layer: QuantizedLinear) -> nn.Module:
    dense: nn.Module
    with torch.device("meta"):
        dense = (
            Conv1D(layer.out_features, layer.in_features)
            if layer.source == "conv1d"
            else nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        )
    numbers = layer.dequantized()
    dense.weight = nn.Parameter(numbers.mT.contiguous() if layer.source == "conv1d" else numbers)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach())
    return dense.eval()


def _parent(name: str) -> str:
    """The form of a leaf, or the layer of a parameter."""
    return name.rpartition(".")[0]
