"""Ordinary checkpoints with weights in few bits, as transformers and torchao alone write and load them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from eckart.checkpoint.save import write_companions
from eckart.errors import CheckpointError, ModelError
from eckart.quantization import require_torchao
from eckart.quantization.kinds import BITS, GROUP
from eckart.quantization.quantize import choose_layers
from eckart.storage.layout import model_folder


def write_quantized(
    model: PreTrainedModel, staging: Path, kind: str, *, tokenizer: Any, source_folder: Path
) -> Mapping[str, Any]:
    """Round the linear layers of an ordinary model by torchao, and write it with transformers' own `TorchAoConfig`.

    Args:
        model: without forms; changed.
        staging: an empty folder.
        kind: one of :data:`eckart.quantization.KINDS`.
        tokenizer: saved with it.
        source_folder: what lies beside its weights is carried over.

    Returns:
        For the record of the export: how many layers are quantized, how many of each kind are not, the bytes.

    Raises:
        CheckpointError: what was written does not compute what the model in memory computes.
        ModelError: the model has no linear layer that transformers quantizes.
    """
    home = staging / model_folder(source_folder).relative_to(source_folder)
    home.mkdir(parents=True, exist_ok=True)
    record = save_rounded(model, home, kind)
    write_companions(staging, tokenizer=tokenizer, source_folder=source_folder)
    return record


def save_rounded(
    model: PreTrainedModel, home: Path, kind: str, *, kept: Mapping[str, str] | None = None, **saving: Any
) -> Mapping[str, Any]:
    """Round the linear layers of a model, and write its weights and configuration alone.

    Args:
        model: without forms; changed.
        home: where they are written.
        kind: one of :data:`eckart.quantization.KINDS`.
        kept: name -> why a linear layer is left as it is.
        **saving: for `save_pretrained`.

    Returns:
        As :func:`write_quantized`, and raises what it raises.
    """
    require_torchao()
    chosen, left = choose_layers(model, kind)
    for name, reason in (kept or {}).items():
        chosen.pop(name, None)
        left[name] = reason
    for name in [name for name in chosen if type(model.get_submodule(name)) is not nn.Linear]:
        left[name] = f"{type(model.get_submodule(name)).__name__}, which transformers does not quantize"
        del chosen[name]
    for name in [name for name, group in chosen.items() if BITS[kind] == 4 and group != GROUP]:
        left[name] = f"rows that groups of {GROUP} do not divide"
        del chosen[name]
    if not chosen:
        listed = "; ".join(f"{count} x {reason}" for reason, count in Counter(left.values()).most_common(3))
        raise ModelError(
            f"{type(model).__name__} has no layer that transformers stores as {kind} ({listed}). Leave --quantize out, "
            "export --format onnx or openvino with it, or quantize the factored folder: eckart compress --quantize."
        )
    settings = _settings(kind)
    _round(model, chosen, settings)
    stated = TorchAoConfig(settings, modules_to_not_convert=sorted(left))
    model.config.quantization_config = stated
    model.hf_quantizer = TorchAoHfQuantizer(stated, pre_quantized=True)  # type: ignore[assignment]
    model.save_pretrained(home, **saving)
    _compare(model, home)
    size = sum(file.stat().st_size for file in home.glob("*.safetensors"))
    return {"quantized_layers": len(chosen), "left": left, "bytes": size}


def _settings(kind: str) -> Any:
    """The configuration of torchao."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    if kind == "int4":  # a format that runs on every device; torchao stores it a byte a number
        return IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=PerGroup(GROUP),
            intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
        )
    made = Int8WeightOnlyConfig if kind == "int8" else Int8DynamicActivationInt8WeightConfig
    return made(set_inductor_config=False, version=2)


def _round(model: nn.Module, chosen: Mapping[str, Any], settings: Any) -> None:
    from torchao.quantization import quantize_

    model.requires_grad_(False)
    quantize_(model, settings, filter_fn=lambda module, name: name in chosen)


def _compare(model: PreTrainedModel, home: Path) -> None:
    """Load the folder as transformers does and hold its output against the model's, to the bit."""
    kind: Any = type(model)
    loaded, info = kind.from_pretrained(home, dtype=model.dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    one, other = model.state_dict(), loaded.state_dict()
    differ = [name for name, value in one.items() if not _same(value, other.get(name))]
    if missing or differ:
        raise CheckpointError(
            f"What was written is not the model: {', '.join([*missing, *differ][:4])}; nothing was published. Export "
            "without --quantize, and please report this with the model's name and the output of `pip list`."
        )


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    names = getattr(one, "tensor_data_names", None)
    if names is None:
        return bool(torch.equal(one, other))
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
