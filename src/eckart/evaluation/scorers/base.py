"""What the scorer of a task is, and what it is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from eckart.data import Pooling
from eckart.evaluation.model import EvaluatedModel
from eckart.evaluation.recipe import EvaluationRecipe


@dataclass(frozen=True)
class EvaluationContext:
    """What is scored, on what.

    Attributes:
        recipe: what was asked for.
        data: a name, or rows or text in memory; None for WikiText-2.
        model: the model.
        original: the model that it was made from; None where none is given.
        tokenizer: reads the data for both.
    """

    recipe: EvaluationRecipe
    data: Any
    model: EvaluatedModel
    original: EvaluatedModel | None
    tokenizer: Any

    @property
    def pooling(self) -> Pooling | None:
        """How a sentence embedding is made; None for the mean over real tokens."""
        pooling = self.model.pooling or (self.original.pooling if self.original is not None else None)
        return pooling.reading(self.tokenizer) if pooling is not None else None


class TaskScorer:
    """Scores models on one task: the same data and protocol for each.

    Attributes:
        compares: whether the scores are distances from the original, which has none of its own.
        data: what the data is, as JSON values.
        protocol: how it is scored, in words; complete once a model is scored.
        notes: what the reader of the scores must know.
        detail: what else the last scores came with, as JSON values; empty where nothing did.
    """

    compares: ClassVar[bool] = False

    def __init__(self, data: Mapping[str, Any], protocol: str = "") -> None:
        self.data = data
        self.protocol = protocol
        self.notes: list[str] = []
        self.detail: dict[str, Any] = {}

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        """Name -> number."""
        raise NotImplementedError
