"""The text that the demo measures on: modules of Python's library that neither training nor calibration reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from eckart.data.documents import load_documents
from eckart.evaluation.perplexity import measure_perplexity


@dataclass
class HeldOutText:
    """So many tokens of the held-out modules, measured in windows.

    Attributes:
        tokens: tokens that are scored.
        window: tokens of a window.
    """

    tokens: int
    window: int

    @cached_property
    def documents(self) -> list[str]:
        documents, _ = load_documents("stdlib", split="held", max_characters=12 * self.tokens)
        return documents

    def measure(self, model: PreTrainedModel, tokenizer: Any) -> float:
        """Perplexity of a causal model."""
        found = measure_perplexity(model, tokenizer, self.documents, window=self.window, max_tokens=self.tokens)
        return float(found["perplexity"])
