"""The loss whose gradients weigh a site's outputs: the model's own curvature, with or without labels.

With own labels the loss is the task's, summed over tokens (the empirical Fisher). Without, targets are
drawn from the model's own output distribution and scored against the logits that they came from (the
true Fisher); a model that outputs features gets a standard normal vector dotted with its output (the
Gauss-Newton matrix of the squared output error).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eckart.errors import DataError

Pooling = Callable[[Any, Tensor | None], Tensor]


def generator(seed: int, example: int) -> torch.Generator:
    """A generator for one example: splitting or resuming a run changes no draw."""
    # Multiplied apart by a large odd constant, so that neighboring seeds do not share streams.
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + example * 0xBF58476D1CE4E5B9) % 2**63)


def labeled_loss(outputs: Any, labels: Tensor, *, shifted: bool) -> Tensor:
    """The model's own mean loss, rescaled to a sum over the labels that it scored.

    Args:
        outputs: of `model(**inputs, labels=labels)`.
        labels: as they were passed; -100 is not scored. On the CPU, so that they are counted without waiting.
        shifted: whether the model scores `labels[:, 1:]` (causal models shift by themselves).

    Raises:
        DataError: if the model returned no loss for its labels.
    """
    loss = getattr(outputs, "loss", None)
    if loss is None:
        raise DataError(
            "labels: the model returned no loss for them. Use a model class with a task head, "
            "or curvature='sampled', which needs no labels."
        )
    scored = labels[:, 1:] if shifted else labels
    count = int((scored != -100).sum()) if not scored.is_floating_point() else len(labels)
    return loss * count


def sampled_loss(
    outputs: Any,
    masks: Mapping[int, Tensor],
    examples: Sequence[int],
    seed: int,
    *,
    pooling: Pooling | None = None,
    attention_mask: Tensor | None = None,
    problem: str | None = None,
) -> Tensor:
    """A token-summed loss whose targets are drawn from the model's own output.

    Args:
        outputs: a model output with `logits`, with `start_logits` and `end_logits`, or with features.
        masks: sequence length -> (B, T) mask of real tokens.
        examples: index of each row, for the draws.
        seed: of the run.
        pooling: makes a sentence embedding of the outputs; without it the last hidden state counts.
        attention_mask: (B, T), for the pooling.
        problem: "regression" or "multi_label_classification" where the head is one.

    Returns:
        A scalar; its gradient at an output is one draw of the curvature's square root.
    """
    generators = [generator(seed, example) for example in examples]
    logits = getattr(outputs, "logits", None)
    if logits is not None and problem not in ("regression", "multi_label_classification"):
        return _categorical(logits, _mask_for(logits, masks), generators)
    if logits is not None and problem == "multi_label_classification":
        logits = logits.float()
        drawn = _uniform(logits, generators) < logits.detach().sigmoid()
        return functional.binary_cross_entropy_with_logits(logits, drawn.float(), reduction="sum")
    if logits is not None:
        return (logits.float() * _normal(logits, generators)).sum()
    if getattr(outputs, "start_logits", None) is not None:
        return sum(
            (_categorical(getattr(outputs, name), None, generators) for name in ("start_logits", "end_logits")),
            start=outputs.start_logits.new_zeros(()),
        )
    if pooling is not None:
        features = pooling(outputs, attention_mask).float()
        return (features * _normal(features, generators)).sum()
    features = _features(outputs)
    mask = _mask_for(features, masks)
    product = features.float() * _normal(features, generators)
    return _sum_real(product, None if mask is None else mask.unsqueeze(-1))


def _features(outputs: Any) -> Tensor:
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None:
        hidden = outputs[0]
    return hidden


def _mask_for(tensor: Tensor, masks: Mapping[int, Tensor]) -> Tensor | None:
    if tensor.dim() < 3:
        return None
    mask = masks.get(tensor.shape[1])
    return mask if mask is not None and mask.shape[0] == tensor.shape[0] else None


def _categorical(logits: Tensor, mask: Tensor | None, generators: Sequence[torch.Generator]) -> Tensor:
    """Summed cross-entropy of `logits` (B, ..., V) against targets drawn from their own softmax."""
    total = logits.new_zeros((), dtype=torch.float32)
    for row, (scores, stream) in enumerate(zip(logits, generators, strict=True)):
        scores = scores.reshape(-1, scores.shape[-1]).float()  # (T, V), one example at a time
        cumulative = scores.detach().softmax(-1).cumsum(-1)
        draw = torch.rand(len(scores), 1, generator=stream).to(scores.device)
        # Inverse transform: one uniform number a token, whatever the vocabulary and the device.
        targets = torch.searchsorted(cumulative, draw * cumulative[:, -1:]).clamp_max(scores.shape[-1] - 1)
        losses = functional.cross_entropy(scores, targets[:, 0], reduction="none")
        total = total + _sum_real(losses, None if mask is None else mask[row].reshape(-1))
    return total


def _sum_real(values: Tensor, mask: Tensor | None) -> Tensor:
    """Their sum where the mask is set. Nothing is selected: a device need not say how many there are."""
    return (values if mask is None else torch.where(mask, values, 0.0)).sum()


def _normal(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    shape = like.shape[1:]
    return torch.stack([torch.randn(shape, generator=stream) for stream in generators]).to(like.device)


def _uniform(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    shape = like.shape[1:]
    return torch.stack([torch.rand(shape, generator=stream) for stream in generators]).to(like.device)
