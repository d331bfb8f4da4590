"""A model that is to be scored: from memory, a folder or the hub, and what it takes to store it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.checkpoint.load import load
from eckart.checkpoint.source import resolve
from eckart.checkpoint.stored import stored_dtype, stored_size, stored_tensors
from eckart.checkpoint.tokenizer import load_tokenizer
from eckart.config import resolve_device
from eckart.data import Pooling
from eckart.evaluation.recipe import EvaluationRecipe
from eckart.evaluation.sentence import find_pooling
from eckart.evaluation.sizes import Size, count_sizes
from eckart.model import cast, factored_modules, shared_clone
from eckart.quantization import kind_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is to be scored.

    Attributes:
        name: the folder or hub name; of a model in memory, its class.
        folder: where it lies; None for a model in memory.
        model: in float32, on the device that computes. Of a model in memory it is a clone: the caller's stays as it is.
        tokenizer: or None where there is none.
        dtype: in which most of its numbers are stored.
        size: of what is stored.
    """

    name: str
    folder: Path | None
    model: PreTrainedModel
    tokenizer: Any
    dtype: torch.dtype
    size: Size

    @property
    def factored(self) -> bool:
        return bool(factored_modules(self.model))

    @property
    def quantized(self) -> bool:
        return kind_of(self.model) is not None

    @cached_property
    def pooling(self) -> Pooling | None:
        """How its folder says that a sentence embedding is made; None where nothing says so."""
        return find_pooling(self.folder, self.model)


def open_model(model: PreTrainedModel | str | Path, recipe: EvaluationRecipe) -> EvaluatedModel:
    """Load a model, or clone one in memory, to be computed with in float32 on the device of the recipe.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
    """
    device: Any = resolve_device(recipe.device)
    if isinstance(model, PreTrainedModel):
        clone = shared_clone(model)
        cast(clone, torch.float32)
        size = count_sizes(model).model
        return EvaluatedModel(type(model).__name__, None, clone.to(device), None, model.dtype, size)
    trusted = recipe.trust_remote_code
    folder = resolve(str(model), recipe.revision, trust_remote_code=trusted)
    tensors = stored_tensors(folder)
    loaded = load(folder, dtype=torch.float32, trust_remote_code=trusted)
    counted = count_sizes(loaded).model
    elements, size_in_bytes = stored_size(tensors)
    size = Size(counted.elements if kind_of(loaded) else elements, size_in_bytes, counted.multiply_adds)
    dtype = stored_dtype(tensors) or torch.float32
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    return EvaluatedModel(str(model), folder, loaded.to(device), tokenizer, dtype, size)
