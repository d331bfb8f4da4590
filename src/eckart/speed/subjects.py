"""The models that are timed: opened, in one type on one device, and themselves in bfloat16 and int8 beside them."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.checkpoint.load import load
from eckart.checkpoint.source import resolve
from eckart.checkpoint.stored import stored_dtype, stored_size, stored_tensors
from eckart.errors import UsageError
from eckart.model import cast as cast_numbers
from eckart.model import factored_modules, shared_clone
from eckart.quantization import kind_of, prepare
from eckart.speed.memory import held_bytes
from eckart.speed.profile import name_of_dtype
from eckart.speed.recipe import BenchRecipe

logger = logging.getLogger(__name__)

ORIGINAL = "original"
MODEL, BASELINE = "model", "baseline"


@dataclass(frozen=True)
class Subject:
    """A model that is timed.

    Attributes:
        name: its row in tables.
        role: "original", "model", or "baseline" for one of these in another type.
        model: in evaluation mode, on the device that computes.
        dtype: "float32", "bfloat16", "float16" or "int8"; of a quantized folder, how it is quantized.
        of: the name of the subject that a baseline was made from; its own name for others.
        facts: where it lies, seconds to load it, bytes of its files.
    """

    name: str
    role: str
    model: PreTrainedModel
    dtype: str
    of: str
    facts: Mapping[str, Any]


def open_subjects(
    models: Sequence[tuple[str, PreTrainedModel | str | Path]], recipe: BenchRecipe, device: torch.device
) -> list[Subject]:
    """Load the models, or clone those in memory, in one type.

    A folder is loaded twice, and the second time counts: files are in the system's cache then, and code is imported.

    Args:
        models: names and models, in memory, folders or hub names; one named "original" is what others were made from.
        recipe: the type, revision and trust.
        device: where they compute.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        UsageError: they are models of different classes.
    """
    subjects: list[Subject] = []
    dtype = getattr(torch, recipe.dtype) if recipe.dtype is not None else None
    for name, given in models:
        if dtype is None:
            dtype = _dtype_of(given, recipe)
        model, facts = _open(given, dtype, recipe, device)
        if subjects and type(subjects[0].model) is not type(model):
            raise UsageError(
                f"{facts['from']}: it is a {type(model).__name__}, {subjects[0].facts['from']} a "
                f"{type(subjects[0].model).__name__}. Time models that were made from one original."
            )
        role = ORIGINAL if name == ORIGINAL else MODEL
        subjects.append(Subject(name, role, model, kind_of(model) or name_of_dtype(dtype), name, facts))
    return subjects


def add_baselines(subjects: Sequence[Subject], device: torch.device) -> tuple[list[Subject], list[str]]:
    """All models in bfloat16, the original and factored ones in int8 too; and notes on what is left out.

    Of a model that is quantized already there is no baseline.
    """
    made: list[Subject] = []
    notes: list[str] = []
    for subject in subjects:
        if subject.dtype != "bfloat16" and kind_of(subject.model) is None:
            model = _cast(subject.model, torch.bfloat16)
            made.append(
                Subject(f"{subject.name} bfloat16", BASELINE, model, "bfloat16", subject.name, _facts_of(model))
            )
    compared = any(subject.role == ORIGINAL for subject in subjects)
    for subject in subjects:
        factored = bool(factored_modules(subject.model))
        if not compared or kind_of(subject.model) is not None or not (subject.role == ORIGINAL or factored):
            continue
        try:
            quantized = quantize_int8(subject.model, device)
            made.append(Subject(f"{subject.name} int8", BASELINE, quantized, "int8", subject.name, _facts_of(None)))
        except (ImportError, RuntimeError, NotImplementedError) as error:
            notes.append(f"int8 is not timed: {str(error).splitlines()[0]}")
    return made, notes


def quantize_int8(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Weights of linear layers in int8, their inputs rounded to int8 while they run, without calibration.

    On a CPU by torch's dynamic quantization, elsewhere by torchao. On a CPU without a compiler torchao's kernels are
    two to three times slower, and closer to the model: they have a scale for each token instead of one for all. Factors
    are made ready for it first.

    Raises:
        ImportError: torchao is needed and is not installed.
        RuntimeError: this build of torch has no kernels for it.
    """
    if device.type != "cpu":
        try:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        except ImportError:
            raise ImportError("it needs torchao on this device: pip install 'eckart[quant]'") from None
        clone = shared_clone(model)
        prepare(clone, "int8-dynamic")
        quantize_(_with_linears(clone), Int8DynamicActivationInt8WeightConfig())
        return clone
    clone = _with_linears(_cast(model, torch.float32))
    prepare(clone, "int8-dynamic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        return cast(PreTrainedModel, quantize_dynamic(clone, {nn.Linear}, dtype=torch.qint8, inplace=True))


def _with_linears(model: PreTrainedModel) -> PreTrainedModel:
    """GPT-2's Conv1D as Linears, which quantizers know; changed in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):
                inputs, outputs = child.weight.shape
                linear = nn.Linear(inputs, outputs, device="meta")
                linear.weight = nn.Parameter(child.weight.detach().mT.contiguous(), requires_grad=False)
                linear.bias = child.bias
                setattr(module, name, linear)
    return model


def _dtype_of(given: PreTrainedModel | str | Path, recipe: BenchRecipe) -> torch.dtype:
    if isinstance(given, PreTrainedModel):
        return given.dtype
    folder = resolve(str(given), recipe.revision, trust_remote_code=recipe.trust_remote_code)
    return stored_dtype(stored_tensors(folder)) or torch.float32


def _open(
    given: PreTrainedModel | str | Path, dtype: torch.dtype, recipe: BenchRecipe, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]]:
    if isinstance(given, PreTrainedModel):
        model = _cast(given, dtype).to(device)  # type: ignore[arg-type]
        return model.eval(), {"from": type(given).__name__, **_facts_of(model)}
    trusted = recipe.trust_remote_code
    folder = resolve(str(given), recipe.revision, trust_remote_code=trusted)

    def read() -> PreTrainedModel:
        loaded = load(folder, dtype=dtype, trust_remote_code=trusted).to(device)  # type: ignore[arg-type]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return loaded

    model = read()
    del model
    gc.collect()
    start = time.perf_counter()
    model = read()
    seconds = time.perf_counter() - start
    _, size = stored_size(stored_tensors(folder))
    return model, {**_facts_of(model), "from": str(given), "load_seconds": seconds, "file_bytes": size}


def _facts_of(model: PreTrainedModel | None) -> dict[str, Any]:
    if model is None:
        return {"from": None, "load_seconds": None, "file_bytes": None, "held_bytes": None, "factored": 0}
    return {
        "from": None,
        "load_seconds": None,
        "file_bytes": None,
        "held_bytes": held_bytes(model),
        "factored": len(factored_modules(model)),
    }


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    clone = shared_clone(model)
    cast_numbers(clone, dtype)
    return clone.eval()
