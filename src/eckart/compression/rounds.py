"""Several rounds: statistics are gathered again on a model that is part of the way, and ranks are chosen by those.

A curve predicts the loss of a cut by a second-order expansion around the model whose statistics it was made of. Around
the original that is far from where a small model ends. So a larger model is made first, of the size

    keep ^ (round / rounds),

and what its weights are given, and how its loss depends on what they put out, is measured there. The weights that are
factored, and what a refit fits to, stay the original's; the last round has the size that was asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import cast

from transformers import PreTrainedModel

from eckart.compression.context import CompressionContext
from eckart.compression.prepare import start_calibration
from eckart.compression.recipe import Recipe
from eckart.compression.result import Result
from eckart.compression.settings import Settings
from eckart.errors import ModelError, UsageError
from eckart.model import WeightLoader, to_dense_modules, with_separate_experts
from eckart.storage.store import MemoryStore

logger = logging.getLogger(__name__)


def earlier_rounds(recipe: Recipe) -> Iterator[Recipe]:
    """The recipes of all rounds but the last: their sizes, and no stage that concerns the final model alone."""
    plain = {"rounds": 1, "quantize": None, "latency": False, "embeddings": "dense"}
    for number in range(1, recipe.rounds):
        yield recipe.model_copy(update={**plain, "keep": recipe.keep ** (number / recipe.rounds)})


def go_through_rounds(
    context: CompressionContext, settings: Settings, recipe: Recipe, make_model: Callable[[Recipe], Result]
) -> list[dict[str, float]]:
    """Make the models of the earlier rounds, and leave in the context the statistics of the last of them.

    Args:
        context: the original, and its statistics.
        settings: method, form, allocation.
        recipe: with the number of rounds.
        make_model: makes the model of a recipe of the statistics that the context has.

    Returns:
        Size and measured quality of each earlier round.

    Raises:
        UsageError: the model is larger than memory, or no method reads statistics.
    """
    if recipe.rounds == 1:
        return []
    if context.workspace.streaming:
        raise UsageError(
            f"--rounds {recipe.rounds}: each round runs a whole model, and it is worked on block by block. Pass "
            "--stream off where it fits into memory."
        )
    if context.data is None or not settings.needs():
        raise UsageError(
            f"--rounds {recipe.rounds}: method {settings.method.name} reads no statistics, so that every round would "
            "give the same. Leave it out."
        )
    found = []
    store = context.workspace.store
    for earlier in earlier_rounds(recipe):
        context.workspace.store = MemoryStore()
        result = make_model(earlier)
        found.append({"keep": round(earlier.keep, 4), "quality": result.report["quality"]})
        try:
            model = cast(PreTrainedModel, to_dense_modules(result.model))
        except ModelError:  # everything stayed dense: nothing has changed
            continue
        model = with_separate_experts(model)
        context.calibration = start_calibration(context, [settings], recipe, model, WeightLoader(model, None))
    context.workspace.store = store
    return found
