"""Tasks agreement and embedding: how far a model's outputs are from the original's."""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedModel

from eckart.data import CalibrationData, load_data
from eckart.evaluation.agreement import compare_embeddings, compare_predictions, puts_out_tokens
from eckart.evaluation.model import EvaluatedModel
from eckart.evaluation.outputs import compare_outputs
from eckart.evaluation.scorers.base import EvaluationContext, TaskScorer


class AgreementScorer(TaskScorer):
    """Divergence of the predictions from the original's.

    Class attributes:
        pools: whether sentence embeddings are compared.
    """

    compares: ClassVar[bool] = True
    pools: ClassVar[bool] = False

    def __init__(self, context: EvaluationContext, original: EvaluatedModel) -> None:
        recipe = context.recipe
        self.original = original
        self.read_as = context.pooling if self.pools else None
        self.batches = load_data(
            context.data,
            tokenizer=context.tokenizer,
            model=context.model.model,
            config=recipe.data_config,
            split=recipe.data_split or ("held" if context.data == "stdlib" else "test"),
            column=recipe.data_column,
            target_column=recipe.data_target_column,
            revision=recipe.data_revision,
            num_samples=recipe.num_samples,
            max_seq_length=recipe.max_seq_length,
            batch_size=recipe.batch_size,
            pooling=self.read_as,
        )
        read = f"{self.batches.num_examples} examples, {self.batches.num_tokens} tokens"
        super().__init__(self.batches.description, f"{read}, each compared with the original")

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        return score_agreement(model, self.original.model, self.batches)


class EmbeddingScorer(AgreementScorer):
    """Cosine distance of the sentence embeddings from the original's."""

    pools: ClassVar[bool] = True

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        original = self.original.model
        if self.read_as is not None or puts_out_tokens(original, next(iter(self.batches))):
            found = compare_embeddings(model, original, self.batches, self.read_as)
        else:
            found = compare_outputs(model, original, self.batches)
        return {"1 - cosine to the original": found["cosine_distance"], "worst 1 - cosine": found["worst"]}


def score_agreement(model: PreTrainedModel, original: PreTrainedModel, batches: CalibrationData) -> dict[str, float]:
    """Mean KL divergence from the original's predictions, and how often the most likely token or class is the same."""
    found = compare_predictions(model, original, batches)
    return {"KL to the original (nats)": found["kl"], "same most likely": found["top1"]}
