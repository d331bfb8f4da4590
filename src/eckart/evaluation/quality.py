"""How near a compressed model is to its original, on text that neither was fitted to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from eckart.data import CalibrationData, Pooling
from eckart.data.batch import Batch
from eckart.data.inference import evaluating, run
from eckart.errors import NumericalError
from eckart.evaluation.agreement import compare_embeddings, compare_predictions, predicts_distribution, puts_out_tokens
from eckart.evaluation.divergence import negative_log_likelihood
from eckart.evaluation.outputs import compare_outputs
from eckart.moments import run_in_halves


def measure_quality(
    model: nn.Module, original: nn.Module, held: CalibrationData, pooling: Pooling | None
) -> dict[str, Any]:
    """Compare the predictions, or the embeddings of a model that predicts no distribution (features, scores).

    Of a model that puts out neither (two towers, maps) all outputs are compared.

    Args:
        model: the compressed model.
        original: the model it was made from; its output on the first batch decides what is compared.
        held: batches that were not calibrated on.
        pooling: how sentence embeddings are made, for embedding models.

    Returns:
        `agreement` or `embedding`, with how many examples and tokens were read.

    Raises:
        NumericalError: if the compressed model's output is not finite.
        UsageError: if the outputs of the two models differ in shape.
    """
    first = next(iter(held)).rows(0, 1)
    if pooling is None and predicts_distribution(original, first):
        name, values = "agreement", compare_predictions(model, original, held)
    elif pooling is not None or puts_out_tokens(original, first):
        name, values = "embedding", compare_embeddings(model, original, held, pooling)
    else:
        name, values = "embedding", compare_outputs(model, original, held)
    if not values["finite"]:
        raise NumericalError(
            f"the compressed {type(model).__name__}'s output on held-out text is not finite ({values}); it is not "
            "published. Store in float32 with --dtype float32, raise --keep, or leave out layers with --ignore."
        )
    return {name: values, "examples": held.num_examples, "tokens": held.num_tokens}


def distance_to_original(measured: dict[str, Any]) -> float:
    """One number of :func:`measure_quality`: KL in nats a token, or 1 - cosine; 0 for the original itself."""
    if "agreement" in measured:
        return float(measured["agreement"]["kl"])
    return float(measured["embedding"]["cosine_distance"])


def score_next_tokens(model: nn.Module, held: CalibrationData) -> float:
    """Perplexity of a causal model on the next tokens of batches, padding left out."""

    def score(batch: Batch) -> tuple[float, int]:
        logits = run(model, batch.inputs).logits[:, :-1]
        ids = batch.inputs["input_ids"][:, 1:].to(logits.device)
        mask = batch.masks()[batch.inputs["input_ids"].shape[1]][:, 1:].to(logits.device)
        return float(negative_log_likelihood(logits[mask], ids[mask]).sum()), int(mask.sum())

    with evaluating(model):
        found = list(run_in_halves(held, score))
    total, count = sum(cost for cost, _ in found), sum(size for _, size in found)
    return math.exp(min(total / max(count, 1), 700.0))


def score_classes(model: nn.Module, held: CalibrationData) -> float:
    """Accuracy of a classifier on batches whose rows have labels."""

    def score(batch: Batch) -> tuple[int, int]:
        labels = batch.inputs["labels"]
        logits = run(model, {k: v for k, v in batch.inputs.items() if k != "labels"}).logits
        return int(torch.eq(logits.argmax(-1).cpu(), labels.cpu()).sum()), len(labels)

    with evaluating(model):
        found = list(run_in_halves(held, score))
    right, count = sum(hits for hits, _ in found), sum(size for _, size in found)
    return right / max(count, 1)
