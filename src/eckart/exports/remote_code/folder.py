"""Weights, config.json and the Python file of a model, in one folder."""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.data.auto_classes import exact_auto_classes
from eckart.errors import ModelError
from eckart.exports.remote_code.describe import WAY_OUT, Described, built_by_class, describe
from eckart.exports.remote_code.parallel import Parallel, plan_parallel
from eckart.exports.remote_code.write_text import ModelNames, entries, in_base, names_of, write_text
from eckart.exports.torchao import save_rounded
from eckart.model import pruned_heads
from eckart.quantization import prepare

AS_NAMED: dict[str, Any] = {"save_original_format": False}
"""By the names in the model: transformers knows older names only of classes that it has itself."""

NOT_CARRIED = {"architectures", "auto_map", "model_type", "quantization_config", "transformers_version"}
"""Of the configuration: what is written anew."""


@dataclass(frozen=True)
class Rounded:
    """A model with weights in few bits.

    Attributes:
        model: of the generated class.
        record: how many layers are quantized, how many are left for which reason, the bytes, notes.
    """

    model: PreTrainedModel
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        names: the classes.
        parallel: how it is split among processes.
        auto_classes: names of those that load it: of the model, then, if it has a head, of its base model.
        unserved: why vLLM cannot serve it; "" if nothing is known that hinders.
        rounded: what was written where it was quantized; None where it was not.
    """

    names: ModelNames
    parallel: Parallel
    auto_classes: list[str]
    unserved: str
    rounded: Rounded | None = None


def write_model(model: PreTrainedModel, home: Path, quantize: str | None = None) -> Written:
    """Write a model as remote code.

    Args:
        model: in evaluation mode, on the CPU; changed where it is quantized.
        home: an empty folder.
        quantize: one of :data:`eckart.quantization.KINDS`: linear layers are rounded by torchao, leaves among them.

    Raises:
        ModelError: its modules cannot be replaced in the `__init__` of its class, or none of them can be rounded.
    """
    notes = prepare(model, quantize) if quantize is not None else []
    names = names_of(model)
    described = describe(model)
    inside = in_base(names, described.replacements)
    outside = names.split(described.head_counts)[1]
    if outside:
        raise ModelError(f"{next(iter(outside))}: heads are gone outside of the base model. {WAY_OUT}")
    stock = built_by_class(model)
    class_plan = dict(getattr(names.config, "base_model_tp_plan", None) or {})
    parallel = plan_parallel(
        stock.base_model, class_plan, inside, heads_are_gone=bool(pruned_heads(model)),
        plan_of_parts=any(getattr(part, "tp_plan", None) for part in stock.base_model.children()),
    )  # fmt: skip
    text = write_text(names, described, parallel, class_plan)
    file = home / f"{names.module}.py"
    file.write_text(text, encoding="utf-8")
    classes = (type(model), *([names.base] if names.head else []))
    auto_classes = [exact_auto_classes(model.config, one) for one in classes]
    if not auto_classes[0]:
        raise ModelError(f"No Auto class of transformers loads {type(model).__name__}. {WAY_OUT}")
    with _imported(file) as module:
        exported = _filled(model, module, names, described)
        exported.config.auto_map = _auto_map(names, auto_classes)
        if quantize is None:
            exported.save_pretrained(home, **AS_NAMED)
            rounded = None
        else:
            record = save_rounded(exported, home, quantize, kept=_tables(described), **AS_NAMED)
            rounded = Rounded(exported, {**record, "left": dict(Counter(record["left"].values())), "notes": notes})
    loaded_by = [one[0] for one in auto_classes if one]
    return Written(names, parallel, loaded_by, _unserved(model, names, described, parallel), rounded)


def _tables(described: Described) -> dict[str, str]:
    """Layers that belong to embeddings: heads that are tied to them read their numbers."""
    return {
        f"{name}.expand": "part of an embedding"
        for name, one in described.replacements.items()
        if one.form in ("embedding", "safe-embedding")
    }


def _unserved(model: PreTrainedModel, names: ModelNames, described: Described, parallel: Parallel) -> str:
    if parallel.engine_reason:
        return parallel.refusal
    if names.split(described.replacements)[1]:
        return "vLLM builds the head itself, and this one has other modules."
    if not getattr(model, "_supports_attention_backend", False):
        return f"vLLM's transformers backend does not take {type(model).__name__}: its attention cannot be replaced."
    return ""


def _filled(model: PreTrainedModel, module: ModuleType, names: ModelNames, described: Described) -> PreTrainedModel:
    """The exported class with the model's tensors."""
    config = _config(model, module, names, described)
    made: Any = getattr(module, names.exported)
    with torch.device("meta"):
        try:
            exported: PreTrainedModel = made(config)
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(
                f"The modules of {type(model).__name__} cannot be replaced in the __init__ of its class "
                f"({type(error).__name__}: {error}). {WAY_OUT}"
            ) from error
    state = exported.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in described.tensors.items()}
    wrong = [name for name in {*state, *shapes} if name not in state or shapes.get(name) != tuple(state[name].shape)]
    if wrong:
        raise ModelError(
            f"{type(model).__name__} with its modules replaced in the __init__ of its class has other tensors than the "
            f"model: {', '.join(sorted(wrong)[:4])}. {WAY_OUT}"
        )
    exported.load_state_dict(described.tensors, strict=True, assign=True)
    exported.tie_weights()
    there = dict(model.named_buffers())
    for name, buffer in list(exported.named_buffers()):
        if buffer.is_meta:  # in no file: each class makes it from its configuration
            owner, _, key = name.rpartition(".")
            exported.get_submodule(owner)._buffers[key] = there[name]
    if hasattr(exported, "generation_config"):
        exported.generation_config = model.generation_config
    return exported.eval()


def _config(model: PreTrainedModel, module: ModuleType, names: ModelNames, described: Described) -> Any:
    fields = {key: value for key, value in model.config.to_dict().items() if key not in NOT_CARRIED}
    outside = names.split(described.replacements)[1]
    counts, _ = names.split(described.head_counts)
    fields["factored_modules"] = entries(in_base(names, described.replacements))
    if outside:
        fields["factored_head_modules"] = entries(outside)
    if counts:
        fields["head_counts"] = counts
    if described.unties:
        fields["tie_word_embeddings"] = False
    config = getattr(module, names.exported_config)(**fields)
    config.dtype = model.config.dtype
    return config


def _auto_map(names: ModelNames, auto_classes: Sequence[Sequence[str]]) -> dict[str, str]:
    exported = (names.exported, names.exported_base)
    made = {auto: f"{names.module}.{one}" for autos, one in zip(auto_classes, exported, strict=False) for auto in autos}
    return {"AutoConfig": f"{names.module}.{names.exported_config}"} | made


@contextmanager
def _imported(file: Path) -> Iterator[ModuleType]:
    """The generated file as a module, under a name of its own while it is used."""
    name = f"eckart_export_{uuid.uuid4().hex}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    written = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # the folder is published as it is
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.dont_write_bytecode = written
        del sys.modules[name]
