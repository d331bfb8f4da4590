"""What runs on a batch: a forward pass, and the loss whose gradients are wanted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.data import Batch, CalibrationData, Pooling, model_kind
from eckart.data.inference import device_of, forward
from eckart.data.model_kind import has_head, head_problem
from eckart.errors import NumericalError, UsageError
from eckart.moments import Step, labeled_loss, needs_backward, sampled_loss

OWN_TEXT = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForPreTraining")
"""What loads heads whose labels are the text itself."""


@dataclass(frozen=True)
class Loss:
    """A step to run on every batch.

    Attributes:
        name: "none" for a plain forward, "sampled" or "labels".
        step: runs the model on a batch and returns the loss, if there is one.
    """

    name: str
    step: Step


def choose_loss(
    model: PreTrainedModel,
    data: CalibrationData,
    needs: frozenset[str],
    curvature: str,
    seed: int,
    pooling: Pooling | None,
) -> Loss:
    """The loss that the statistics need.

    Args:
        model: the model.
        data: batches.
        needs: names of statistics.
        curvature: "auto" (own labels where the data has them, else draws), "sampled" or "labels".
        seed: of the draws.
        pooling: how sentence embeddings are made, for embedding models.

    Raises:
        UsageError: labels are asked for, and there are none.
    """
    if not needs_backward(needs):
        return Loss("none", plain_step(model))
    if curvature == "labels" or (curvature == "auto" and data.has_labels):
        if not data.has_labels and not _has_own_labels(model, pooling):
            raise UsageError(
                f"--curvature labels: the data has no labels for {type(model).__name__}. Name their column "
                "(--data-label-column, or --data-target-column of an encoder-decoder), or leave the option out."
            )
        return Loss("labels", labeled_step(model))
    return Loss("sampled", sampled_step(model, seed, pooling))


def _has_own_labels(model: PreTrainedModel, pooling: Pooling | None) -> bool:
    """Whether a model's labels are the text that it reads."""
    two_sided = model_kind(model.config, model) == "encoder-decoder"
    return pooling is None and not two_sided and has_head(model.config, model, *OWN_TEXT)


def plain_step(model: PreTrainedModel) -> Step:
    """A forward pass, without a loss."""

    def step(batch: Batch) -> Tensor | None:
        forward(model, batch.inputs)
        return None

    return step


def sampled_step(model: PreTrainedModel, seed: int, pooling: Pooling | None) -> Step:
    """The loss of targets that are drawn from the model's own predictions: the true Fisher.

    Raises:
        NumericalError: it is not finite.
    """
    problem = head_problem(model)
    device = device_of(model)
    body: nn.Module = model.base_model if pooling is not None else model  # a head on it is not read

    def step(batch: Batch) -> Tensor | None:
        outputs = forward(body, batch.inputs)
        mask = batch.inputs.get("attention_mask")
        masks = {length: mask.to(device) for length, mask in batch.masks().items()}
        loss = sampled_loss(outputs, masks, batch.examples, seed, pooling=pooling, attention_mask=mask, problem=problem)
        return _finite(loss, batch)

    return step


def labeled_step(model: PreTrainedModel) -> Step:
    """The loss of the data's labels, or of the text itself: the empirical Fisher.

    Raises:
        NumericalError: it is not finite.
    """
    shifted = model_kind(model.config, model) == "causal"

    def step(batch: Batch) -> Tensor | None:
        labels = batch.inputs.get("labels")
        if labels is None:  # a language model's labels are its own text; causal models shift by themselves
            labels = batch.inputs["input_ids"].clone()
            mask = batch.inputs.get("attention_mask")
            if mask is not None:
                labels[~mask.bool()] = -100
        outputs = forward(model, batch.inputs, labels=labels.to(device_of(model)))
        return _finite(labeled_loss(outputs, labels, shifted=shifted), batch)  # counted where they came from

    return step


def _finite(loss: Tensor, batch: Batch) -> Tensor:
    if not bool(torch.isfinite(loss)):
        raise NumericalError(
            f"calibration examples {batch.examples[0]} to {batch.examples[-1]}: the loss is {float(loss)}. "
            "Load the model in float32 or bfloat16, or look at this text."
        )
    return loss
