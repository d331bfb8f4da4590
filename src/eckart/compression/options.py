"""One recipe from what a caller gives: a recipe object, keyword options, and objects that have a name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.compression.recipe import Recipe
from eckart.config import merge_recipe, resolve_device
from eckart.methods import Method


def combine_options(
    recipe: Recipe | None,
    options: Mapping[str, Any],
    *,
    model: Any = None,
    data: Any = None,
    method: str | Method | None = None,
    form: Any = None,
    where: str = "eckart.compress",
) -> Recipe:
    """Combine a recipe with options, which take the place of its own.

    A method or form of one's own becomes known by its name, in this process: plans, checkpoints and reports name it.

    Raises:
        UsageError: naming an unknown option with the nearest spelling, or a value that cannot be.
    """
    content = dict(options)
    content |= {k: str(v) for k, v in (("model", model), ("data", data)) if isinstance(v, str | Path)}
    content |= {key: value for key, value in (("method", method), ("form", form)) if value is not None}
    return merge_recipe(Recipe, recipe, content, where)


def dtype_of(recipe: Recipe) -> torch.dtype | None:
    """The type of the stored numbers; None for that of the model."""
    found: torch.dtype | None = getattr(torch, recipe.dtype) if recipe.dtype else None
    return found


def device_of(recipe: Recipe, model: PreTrainedModel | None = None) -> torch.device:
    """The device that computes: as asked, or where a model on an accelerator is, or a GPU if there is one."""
    if recipe.device == "auto" and model is not None and model.device.type != "cpu":
        return model.device
    return resolve_device(recipe.device)
