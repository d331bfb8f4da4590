"""How far a smaller model's outputs are from its original's: what a training makes small that looks at outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.compression.divergence_loss import DivergenceLoss
from eckart.data import Batch, Pooling
from eckart.evaluation.agreement import logits_of
from eckart.evaluation.output_distance import OutputDistance


@dataclass(frozen=True)
class OutputError:
    """The sum of the distances of a batch's rows, and their number.

    Attributes:
        distance: says what is compared of an output: logits of each token.
        original: the model.
        smaller: the one that is trained.
        run_original: gives its outputs for a batch; no gradients are kept.
        run_smaller: gives those of the smaller model.
        device: where both run.
    """

    distance: OutputDistance
    original: nn.Module
    smaller: nn.Module
    run_original: Callable[[Batch], Any]
    run_smaller: Callable[[Batch], Any]
    device: torch.device

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            originals = self.distance.rows(self.original, self.run_original(batch), batch)
        with mixed_precision(self.original, self.device):
            output = self.run_smaller(batch)
        rows = self.distance.rows(self.smaller, output, batch)
        found = torch.cat([DivergenceLoss.apply(*pair) for pair in zip(rows, originals, strict=True)])
        total = found.float().sum()
        return total, total.new_tensor(float(len(found)))


def mixed_precision(original: nn.Module, device: torch.device) -> torch.autocast:
    """Steps multiply in bfloat16 if the original computes in it; what is held out is measured in float32."""
    narrow = torch.is_grad_enabled() and getattr(original, "dtype", None) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=narrow)


def distance_by_token(model: nn.Module, batch: Batch, pooling: Pooling | None) -> OutputDistance | None:
    """The distance of a model's outputs where it has a number for each token; else None.

    One number for a whole text says too little for so many parameters: on the vectors of 1,024 sentences, of which the
    last block of a sentence encoder was trained to make the cosines large, it became worse on others.
    """
    first = batch.rows(0, 1)
    distance = OutputDistance.of(model, first, pooling)
    if distance.kind != "classes":
        return None
    logits = logits_of(model, distance.run(model, first), first)
    return distance if logits and logits[0].dim() == 3 else None
