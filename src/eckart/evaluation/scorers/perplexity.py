"""Task perplexity: how well a causal model predicts running text."""

from __future__ import annotations

from functools import cached_property

from transformers import PreTrainedModel

from eckart.config import DEFAULT_BATCH_SIZE, DEFAULT_TOKENS
from eckart.data import CalibrationData, load_data
from eckart.data.documents import load_documents
from eckart.evaluation.perplexity import measure_perplexity
from eckart.evaluation.scorers.base import EvaluationContext, TaskScorer
from eckart.evaluation.scorers.comparison import score_agreement

AGREEMENT_TOKENS = 16_384
"""Tokens of the text that are also compared with the original, position by position."""

CHARACTERS_A_TOKEN = 12
"""More than tokens have: so much text is read that it holds the tokens asked for."""


class PerplexityScorer(TaskScorer):
    """Perplexity and bits per byte; beside an original, the agreement of the predictions too."""

    def __init__(self, context: EvaluationContext) -> None:
        recipe = context.recipe
        self.context = context
        self.texts, described = load_documents(
            context.data,
            tokenizer=context.tokenizer,
            config=recipe.data_config,
            split=recipe.data_split,
            column=recipe.data_column,
            revision=recipe.data_revision,
            max_characters=CHARACTERS_A_TOKEN * recipe.max_tokens if recipe.max_tokens is not None else None,
        )
        self.batch_size = recipe.batch_size or DEFAULT_BATCH_SIZE
        super().__init__(described)

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        recipe, original = self.context.recipe, self.context.original
        measured = measure_perplexity(
            model,
            self.context.tokenizer,
            self.texts,
            batch_size=self.batch_size,
            window=recipe.max_seq_length,
            max_tokens=recipe.max_tokens,
        )
        self.protocol = f"{measured['tokens']} tokens scored; {measured['protocol']}"
        if measured["nonfinite_tokens"]:
            self.notes.append(f"{measured['nonfinite_tokens']} tokens have a likelihood that is not finite")
        found = {"perplexity": measured["perplexity"], "bits per byte": measured["bits_per_byte"]}
        if original is not None and model is not original.model:
            found |= score_agreement(model, original.model, self._windows)
        return found

    @cached_property
    def _windows(self) -> CalibrationData:
        recipe = self.context.recipe
        tokens = min(recipe.max_tokens or AGREEMENT_TOKENS, AGREEMENT_TOKENS)
        return load_data(
            self.texts,
            tokenizer=self.context.tokenizer,
            model=self.context.model.model,
            max_seq_length=recipe.max_seq_length,
            batch_size=self.batch_size,
            num_samples=max(1, tokens // (recipe.max_seq_length or DEFAULT_TOKENS)),
        )
