"""How near a compressed model is to its original, on text that neither was fitted to."""

from __future__ import annotations

from typing import Any

from torch import nn

from eckart.data import CalibrationData, Pooling
from eckart.errors import NumericalError
from eckart.measure.agreement import agreement, embedding_cosine
from eckart.model import has_head


def quality(model: nn.Module, original: nn.Module, held: CalibrationData, pooling: Pooling | None) -> dict[str, Any]:
    """Agreement of the logits, or of the embeddings of a model without a head.

    Args:
        model: the compressed model.
        original: the model it was made from.
        held: batches that were not calibrated on.
        pooling: how sentence embeddings are made, for models without a head.

    Returns:
        `agreement` or `embedding`, with how many examples and tokens were read.

    Raises:
        NumericalError: if the compressed model's output is not finite.
    """
    name = "agreement" if has_head(original) else "embedding"
    if has_head(original):
        values = agreement(model, original, held)
    else:
        values = embedding_cosine(model, original, held, pooling)
    if not values["finite"]:
        raise NumericalError(
            f"the compressed {type(model).__name__}'s output on held-out text is not finite ({values}); it is not "
            "published. Store in float32 with --dtype float32, raise --keep, or leave out layers with --ignore."
        )
    return {name: values, "examples": held.num_examples, "tokens": held.num_tokens}


def distance(measured: dict[str, Any]) -> float:
    """One number of :func:`quality`: KL in nats a token, or 1 - cosine; 0 for the original itself."""
    if "agreement" in measured:
        return float(measured["agreement"]["kl"])
    return float(measured["embedding"]["cosine_distance"])
