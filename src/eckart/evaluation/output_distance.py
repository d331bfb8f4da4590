"""How far the output of a changed model is from the original's on one batch, which is kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.data.batch import Batch
from eckart.data.inference import forward
from eckart.data.model_kind import head_problem
from eckart.data.pooling import Pooling
from eckart.evaluation.agreement import (
    MULTI_LABEL,
    compared_logits,
    logits_of,
    predicts_distribution,
    puts_out_tokens,
)
from eckart.evaluation.divergence import compare_labels
from eckart.evaluation.outputs import list_outputs

PIECE = 128
"""Rows at a time, so that what is computed of them stays in a processor's cache."""

Reference = Sequence[tuple[Tensor, Tensor | None]]
"""Of each part of the original's output: what others are held against."""


@dataclass(frozen=True)
class OutputDistance:
    """A distance of outputs, as :func:`eckart.evaluation.quality.measure_quality` takes it.

    Attributes:
        kind: "classes": KL of what is predicted, in nats; "labels": the same of several labels at once; "embeddings" or
            "outputs": 1 - cosine.
        pooling: how sentence embeddings are made.
    """

    kind: str
    pooling: Pooling | None = None

    @classmethod
    def of(cls, model: nn.Module, batch: Batch, pooling: Pooling | None) -> OutputDistance:
        """The one that fits a model."""
        first = batch.rows(0, 1)
        if pooling is None and predicts_distribution(model, first):
            return cls("labels" if head_problem(model) == MULTI_LABEL else "classes")
        if pooling is not None or puts_out_tokens(model, first):
            return cls("embeddings", pooling)
        return cls("outputs")

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """Run what is compared: the model, or what is below its head."""
        return forward(getattr(model, "base_model", model) if self.kind == "embeddings" else model, batch.inputs)

    def rows(self, model: nn.Module, output: Any, batch: Batch) -> list[Tensor]:
        """What is compared of an output, part by part: (N, V) logits of real tokens or of rows, or (B, d) vectors."""
        if self.kind == "embeddings":
            return [(self.pooling or Pooling())(output, batch.inputs.get("attention_mask")).double()]
        if self.kind == "outputs":
            return [value for _, value in list_outputs(output, batch)]
        return [compared_logits(logits, batch) for logits in logits_of(model, output, batch)]

    def reference(self, parts: Sequence[Tensor]) -> Reference:
        """What :meth:`between` needs of the original's parts, computed once: of classes p and `sum p log p`."""
        if self.kind != "classes":
            return [(part, None) for part in parts]
        found = []
        for part in parts:
            log = part.float().log_softmax(-1)
            p = log.exp()
            found.append((p, torch.where(p > 0, p * log, 0.0).sum(-1)))
        return found

    def between(self, parts: Sequence[Tensor], reference: Reference) -> Tensor:
        """(N,) distances of all rows of all parts from the original's."""
        return torch.cat([self._between(part, *known) for part, known in zip(parts, reference, strict=True)])

    def _between(self, rows: Tensor, known: Tensor, entropy: Tensor | None) -> Tensor:
        if self.kind == "labels":
            return compare_labels(rows, known)[0].flatten()
        if entropy is None:
            return 1 - nn.functional.cosine_similarity(rows, known, dim=-1)
        # KL(p || q) = sum p log p - p . z + log sum exp z with the logits z of q: one product and one sum a row.
        pieces = [
            entropy[i : i + PIECE] - _expected(known[i : i + PIECE], piece) + piece.logsumexp(-1)
            for i in range(0, len(rows), PIECE)
            for piece in [rows[i : i + PIECE].float()]
        ]
        return torch.cat(pieces).clamp(min=0.0)


def _expected(p: Tensor, logits: Tensor) -> Tensor:
    """(N,) `p . z`; a class that p rules out adds nothing, also where its logit is infinite."""
    products = torch.linalg.vecdot(p, logits)
    if bool(torch.isfinite(products).all()):
        return products
    return torch.where(p > 0, p * logits, 0.0).sum(-1)
