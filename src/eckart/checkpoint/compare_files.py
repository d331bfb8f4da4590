"""A model that is built but not filled, held against the headers of its files: nothing is allocated on a wrong word."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from eckart.checkpoint.stored import FLOATS
from eckart.errors import CheckpointError, ModelError
from eckart.forms.transformers_internals import is_initialized, missing_ignored
from eckart.storage.shards import TensorEntry

MOST = 4_000_000
"""Numbers that may be missing or of another shape without being refused here: loading lists all of these together."""

SHOWN = 8

IN_WORDS = {"I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool"}

_LISTED_BY_CALLER: ContextVar[bool] = ContextVar("listed_by_caller", default=False)


def compare_with_files(
    model: PreTrainedModel, tensors: Mapping[str, TensorEntry], home: Path, *, whole: bool = True
) -> None:
    """Refuse files that do not hold the numbers of a model, by name, shape and type.

    Args:
        model: on the meta device.
        tensors: what the headers of the files say.
        home: the folder, for messages.
        whole: whether the files hold all of the model; False where the modules of some tensors are not built yet, and
            where a head may be new.

    Raises:
        CheckpointError: a tensor has another shape, or the configuration asks for far more than there is.
        ModelError: a weight is stored as whole numbers or in a few bits, without a word on how to read it.
    """
    other, numbers, whole_numbers = [], 0, []
    for name, parameter in model.named_parameters():
        entry = _entry_of(name, model, tensors)
        if entry is None or not math.prod(entry.shape):  # an empty one keeps transformers alone from loading it
            continue
        if tuple(parameter.shape) != entry.shape:
            other.append(f"{name} {entry.shape} instead of {tuple(parameter.shape)}")
            numbers += parameter.numel()
        elif parameter.is_floating_point() and entry.dtype not in FLOATS:
            whole_numbers.append((name, entry))
    if whole_numbers:
        name, entry = whole_numbers[0]
        kind = IN_WORDS.get(entry.dtype, entry.dtype)
        raise ModelError(
            f"{name} in {entry.file} is stored as {kind}, and {len(whole_numbers) - 1} other weights are like "
            f"it: those of a quantized model, whose quantization_config is missing from {home / 'config.json'}. Use "
            "the original, unquantized model, or restore that entry of the config."
        )
    if numbers > MOST:
        raise CheckpointError(
            f"{home} does not hold exactly the weights of {type(model).__name__}. {len(other)} tensors have another "
            f"shape: {_listed(other)}. Load it as "
            f"{' or '.join(model.config.architectures or ['the class it was saved with'])}, or download it again."
        )
    stored = sum(math.prod(entry.shape) for entry in tensors.values())
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if whole and wanted > 2 * stored + MOST:
        largest = max(model.named_parameters(), key=lambda item: item[1].numel())
        raise CheckpointError(
            f"{home / 'config.json'} asks for {wanted:,} numbers, the largest {largest[0]} {tuple(largest[1].shape)}, "
            f"but the weight files hold {stored:,}. Download the folder again."
        )


def require_filled(model: PreTrainedModel) -> None:
    """Refuse a loaded model with a tensor that no file held: transformers draws such tensors at random.

    Of another class than the one that was saved the head may be new, as transformers itself says.

    Raises:
        CheckpointError: naming the tensors.
    """
    if _LISTED_BY_CALLER.get():
        return
    own = type(model).__name__ in (model.config.architectures or ())
    inside = f"{model.base_model_prefix}."
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = dict(_stored_state(model))
    empty = {key for key, tensor in state.items() if not is_initialized(tensor) and not tensor.is_meta}
    poolers = {key for key in state if "pooler." in key}
    lost = []
    for key in sorted(empty - tied.keys()):
        head = model.base_model is not model and not key.startswith(inside)
        new = (head and not own) or (key in poolers and poolers <= empty)  # encoders are saved without their pooler
        if not new and not missing_ignored(model, key):
            lost.append(key)
    if lost:
        raise CheckpointError(
            f"{len(lost)} tensors are missing from the weights of {model.config.name_or_path}: {_listed(lost)}. "
            "Without them the model would be filled with random numbers. Download the folder again."
        )


@contextmanager
def listed_by_caller() -> Iterator[None]:
    """Leave it to the caller to refuse what is missing, together with all other differences."""
    token = _LISTED_BY_CALLER.set(True)
    try:
        yield
    finally:
        _LISTED_BY_CALLER.reset(token)


def _stored_state(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Parameters and buffers that a checkpoint holds, by name, a tied one under each of its names."""
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.numel() and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), tensor


def _entry_of(name: str, model: PreTrainedModel, tensors: Mapping[str, TensorEntry]) -> TensorEntry | None:
    """The stored tensor of a parameter, with or without the prefix of the bare model."""
    prefix = f"{model.base_model_prefix}."
    for stored in (name, name.removeprefix(prefix), prefix + name):
        if stored in tensors:
            return tensors[stored]
    return None


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
