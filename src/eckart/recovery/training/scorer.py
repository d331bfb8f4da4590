"""How a model is scored before and after a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from eckart.data import Batch, Pooling, TaskData
from eckart.data.inference import evaluating, forward
from eckart.evaluation.agreement import compare_embeddings, compare_predictions
from eckart.evaluation.divergence import negative_log_likelihood
from eckart.evaluation.perplexity import measure_perplexity
from eckart.evaluation.tasks import score_classification, score_regression
from eckart.moments import run_in_halves
from eckart.recovery.training.masking import mask_tokens

EVAL_TOKENS = 65_536
"""Tokens of running text that are scored where no number is given."""


@dataclass(frozen=True)
class Scores:
    """The scores of one model.

    Attributes:
        numbers: name -> number.
        right: for each row, the same rows for every model, whether the answer was right; empty where there is no right
            and wrong.
    """

    numbers: dict[str, float]
    right: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Scorer:
    """Scores a model.

    Attributes:
        score: model -> its scores.
        criterion: the number that decides which model is better.
        higher: whether more of it is better.
        protocol: in words.
        against_teacher: whether the score compares with the teacher, whose own score would say nothing.
    """

    score: Callable[[PreTrainedModel], Scores]
    criterion: str
    higher: bool
    protocol: str
    against_teacher: bool = False


def is_better(scorer: Scorer, after: Scores, before: Scores) -> bool:
    """Whether the trained model is to be published in place of the one before.

    It must be at least as good. Where answers are right or wrong it must be better beyond chance: of the rows on which
    the two differ, b that only the new model has right and c that only the old one has, `b - c >= sqrt(b + c)`, one
    standard error of their difference (McNemar 1947); else a few hundred rows would let many worse models pass. A
    number that is not finite is worse than any other.
    """
    new, old = after.numbers[scorer.criterion], before.numbers[scorer.criterion]
    if not math.isfinite(new):
        return False
    if not math.isfinite(old):
        return True
    if after.right:
        pairs = list(zip(after.right, before.right, strict=True))
        gained, lost = pairs.count((True, False)), pairs.count((False, True))
        return gained - lost >= math.sqrt(gained + lost)
    return new >= old if scorer.higher else new <= old


def labeled_scorer(task: str, tokenizer: Any, rows: TaskData, length: int) -> Scorer:
    """Accuracy, F1 and Matthews of a classifier; Spearman and Pearson of a regression head."""

    def score(model: PreTrainedModel) -> Scores:
        if task == "classification":
            found = score_classification(model, tokenizer, rows, max_seq_length=length)
            numbers = {"accuracy": found["accuracy"], "F1": found["f1"], "Matthews": found["matthews"]}
            return Scores(numbers, tuple(found["right"]))
        found = score_regression(model, tokenizer, rows, max_seq_length=length)
        return Scores({"Spearman": found["spearman"], "Pearson": found["pearson"]})

    return Scorer(score, "accuracy" if task == "classification" else "Spearman", True, f"{len(rows)} rows")


def text_scorer(tokenizer: Any, texts: Sequence[str], length: int, windows: int | None) -> Scorer:
    """Perplexity of a causal model."""
    tokens = windows * length if windows is not None else EVAL_TOKENS

    def score(model: PreTrainedModel) -> Scores:
        found = measure_perplexity(model, tokenizer, texts, window=length, max_tokens=tokens)
        return Scores({"perplexity": found["perplexity"]})

    return Scorer(score, "perplexity", False, f"windows of {length} tokens, at most {tokens} tokens")


def sentence_scorer(teacher: PreTrainedModel, batches: Sequence[Batch], pooling: Pooling) -> Scorer:
    """Mean and largest `1 - cosine` of the sentence embeddings to the teacher's."""

    def score(model: PreTrainedModel) -> Scores:
        found = compare_embeddings(model, teacher, batches, pooling)
        return Scores({"1 - cosine": found["cosine_distance"], "worst 1 - cosine": found["worst"]})

    texts, how = sum(map(len, batches)), " and ".join(pooling.modes)
    protocol = f"{texts} texts, each embedding (pooled by {how}) compared with the teacher's"
    return Scorer(score, "1 - cosine", False, protocol, against_teacher=True)


def prediction_scorer(teacher: PreTrainedModel, batches: Sequence[Batch]) -> Scorer:
    """Mean KL divergence from the teacher's predictions, and how often the most likely answer is the same."""

    def score(model: PreTrainedModel) -> Scores:
        found = compare_predictions(model, teacher, batches)
        return Scores({"KL to the teacher": found["kl"], "same most likely": found["top1"]})

    protocol = f"{sum(map(len, batches))} texts, each prediction compared with the teacher's"
    return Scorer(score, "KL to the teacher", False, protocol, against_teacher=True)


def masked_scorer(tokenizer: Any, batches: Sequence[dict[str, Tensor]], seed: int) -> Scorer:
    """Exponential of the mean cost of masked tokens; the same tokens are masked each time."""

    def score(model: PreTrainedModel) -> Scores:

        def cost_of(batch: Batch) -> tuple[float, int]:
            masked = batch.inputs
            logits = forward(model, masked).logits
            chosen = masked["labels"] != -100
            costs = negative_log_likelihood(
                logits[chosen.to(logits.device)], masked["labels"][chosen].to(logits.device)
            )
            return float(costs.sum()), len(costs)

        vocabulary = int(model.config.vocab_size)
        masked = (mask_tokens(batch, tokenizer, vocabulary, seed + number) for number, batch in enumerate(batches))
        with evaluating(model):
            parts = (Batch(inputs, tuple(range(len(inputs["labels"])))) for inputs in masked)
            found = list(run_in_halves(parts, cost_of))
        total, count = sum(cost for cost, _ in found), sum(size for _, size in found)
        mean = total / max(count, 1)
        return Scores({"masked perplexity": math.exp(mean) if mean < 700 else math.inf if mean > 0 else math.nan})

    return Scorer(score, "masked perplexity", False, "15% of the tokens masked, the same each time")
