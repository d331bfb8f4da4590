"""What a compression may lose: read from an option, and measured on held-out data."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel

from eckart.compression.context import CompressionContext
from eckart.compression.measure import measure_quality
from eckart.data import CalibrationData, model_kind
from eckart.errors import UsageError
from eckart.evaluation.quality import score_classes, score_next_tokens


def parse_loss(text: str) -> float:
    """The share that may be lost: "1%" and "0.01" are .01.

    Raises:
        UsageError: it is no share between 0 and 1.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UsageError(f"--max-loss {text}: give a share of the score, such as 1% or 0.01.")
    return share


def loss_of(context: CompressionContext, compressed: PreTrainedModel) -> float:
    """The share that a compressed model loses on held-out data.

    - a causal model: the growth of its perplexity, `ppl / ppl_original - 1`;
    - a classifier whose data has labels: the share of its accuracy that is lost, 0 where nothing is;
    - another model that predicts a distribution: `exp(KL) - 1`, the growth of the perplexity of what the original says;
    - a model of embeddings: 1 - cosine to the original's.
    """
    held = context.held_out
    assert held is not None
    processes = context.workspace.processes
    found: dict[str, Any] = {}
    failed: BaseException | None = None
    causal = context.pooling is None and model_kind(context.model.config, context.model) == "causal"
    if causal or _has_classes(context, held):
        if processes.main:
            try:
                score = score_next_tokens if causal else score_classes
                found = {"before": score(context.model, held), "after": score(compressed, held)}
            except Exception as error:
                failed = error
        processes.raise_if_any_failed(failed)
        found = processes.broadcast(({}, found))[1]
        before, after = found["before"], found["after"]
        return after / before - 1 if causal else max(0.0, 1 - after / before) if before else 0.0
    measured = measure_quality(context, compressed)
    if not measured:
        raise UsageError(f"--max-loss: {context.unmeasured}. Ask for a size instead: --keep 0.7")
    if "agreement" in measured:
        return math.expm1(min(measured["agreement"]["kl"], 700.0))
    return float(measured["embedding"]["cosine_distance"])


def _has_classes(context: CompressionContext, held: CalibrationData) -> bool:
    """Whether rows have labels that are classes, one a row."""
    if not held.has_labels or getattr(context.model.config, "num_labels", 0) < 2:
        return False
    labels = held.batches[0].inputs["labels"]
    return labels.dim() == 1 and not labels.is_floating_point()
