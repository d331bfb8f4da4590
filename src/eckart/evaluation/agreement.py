"""How closely a compressed model's outputs follow the original's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from eckart.data.batch import Batch
from eckart.data.inference import evaluating, progress, run
from eckart.data.model_kind import head_problem
from eckart.data.pooling import Pooling, find_hidden_state
from eckart.errors import DataError, UsageError
from eckart.evaluation.divergence import compare_distributions, compare_labels
from eckart.moments import run_in_halves

MULTI_LABEL = "multi_label_classification"


def compare_predictions(
    model: nn.Module, reference: nn.Module, batches: Iterable[Batch], *, disable: bool | None = None
) -> dict[str, Any]:
    """Compare the predictions of two models.

    For models with logits a token (causal, masked, encoder-decoder, token classification) every real token counts,
    padding does not; for classifiers every row; for models that mark a span its start and its end, among the real
    tokens of a row. Of a classifier of several labels at once each label is a distribution of its own: yes or no.

    Args:
        model: The compressed model.
        reference: The original.
        batches: What both read, without labels.
        disable: True for no progress bar.

    Returns:
        `kl`: mean KL(reference || model) in nats; `top1`: share of positions where the most likely class is the
        same; `tokens` (positions compared, or labels); `unit`: what each of them is, "token", "example", "label" or
        "end of a span"; `standard_error` of `kl` by the choice of the examples, None of a single one; `finite`: False
        where a value is not, which is kept.

    Raises:
        UsageError: If the models return no logits of several classes, or logits of different shapes.
        DataError: If there is nothing to compare.
    """
    costs: list[Tensor] = []
    sizes: list[Tensor] = []
    same, units = 0, set[str]()
    compare = compare_labels if head_problem(reference) == MULTI_LABEL else compare_distributions

    def compare_batch(batch: Batch) -> list[tuple[Tensor, Tensor, int]]:
        found = []
        pairs = list(zip(_logits(model, batch), _logits(reference, batch), strict=True))
        units.add(_unit_of(reference, [truth for _, truth in pairs]))
        for logits, truth in pairs:
            if logits.shape != truth.shape:
                raise UsageError(
                    f"the models' logits differ in shape, {tuple(logits.shape)} and {tuple(truth.shape)}: "
                    "compare a model with the one it was made from"
                )
            divergence, equal = compare(compared_logits(logits, batch), compared_logits(truth.to(logits.device), batch))
            counts = _count_by_example(logits, equal.numel(), batch)
            parts = divergence.cpu().flatten().split(counts.tolist())
            found.append((torch.stack([part.sum() for part in parts]), counts, int(equal.sum())))
        return found

    with evaluating(model, reference):
        for found in run_in_halves(progress(batches, what="agreement", disable=disable), compare_batch):
            for cost, size, equal in found:
                costs.append(cost)
                sizes.append(size)
                same += equal
    count = sum(int(size.sum()) for size in sizes)
    if count == 0:
        raise DataError("batches: no real token to compare: pass batches that hold text")
    total = sum(float(cost.sum()) for cost in costs)
    return {
        "kl": total / count,
        "top1": same / count,
        "tokens": count,
        "unit": units.pop(),
        "standard_error": standard_error(torch.cat(costs), torch.cat(sizes)),
        "finite": math.isfinite(total),
    }


def standard_error(sums: Tensor, counts: Tensor) -> float | None:
    """The standard error of a mean over things that come in groups, by the choice of the groups.

    With s_i the sum and n_i the count of group i of k, and m = sum s / sum n:

        sqrt(k / (k - 1) * sum (s_i - m n_i)^2) / sum n

    Args:
        sums: of each group (k,).
        counts: of each group (k,).

    Returns:
        None of fewer than two groups, or where a sum is not finite.
    """
    held = counts > 0
    sums, sizes = sums[held].double(), counts[held].double()
    groups = len(sums)
    if groups < 2 or not bool(torch.isfinite(sums).all()):
        return None
    off = sums - sums.sum() / sizes.sum() * sizes
    return float((groups / (groups - 1) * (off * off).sum()).sqrt() / sizes.sum())


def compare_embeddings(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Batch],
    pooling: Pooling | None = None,
    *,
    disable: bool | None = None,
) -> dict[str, Any]:
    """Compare the sentence embeddings of two models.

    Args:
        model: The compressed model; a head on it is left out.
        reference: The original.
        batches: What both read.
        pooling: How tokens become a sentence; None for the mean over real tokens of the last hidden state.
        disable: True for no progress bar.

    Returns:
        `cosine_distance`: mean of 1 - cosine; `worst`: the largest; `sentences`; `standard_error` of the mean, None of
        a single sentence; `finite`: False where a value is not, which is kept.

    Raises:
        UsageError: If the models put out no token embeddings.
        DataError: If there is nothing to compare.
    """

    def compare_batch(batch: Batch) -> Tensor:
        mine, truth = embed_sentences(model, batch, pooling), embed_sentences(reference, batch, pooling)
        if mine.shape != truth.shape:
            raise UsageError(
                f"the models' embeddings differ in shape, {tuple(mine.shape)} and {tuple(truth.shape)}: "
                "compare a model with the one it was made from"
            )
        return 1 - torch.nn.functional.cosine_similarity(mine, truth, dim=-1)

    with evaluating(model, reference):
        distances = list(run_in_halves(progress(batches, what="embeddings", disable=disable), compare_batch))
    if not distances:
        raise DataError("batches: no sentence to compare: pass batches that hold text")
    all_ = torch.cat(distances)
    return {
        "cosine_distance": float(all_.mean()),
        "worst": float(all_.max()),
        "sentences": len(all_),
        "standard_error": standard_error(all_, torch.ones_like(all_)),
        "finite": bool(torch.isfinite(all_).all()),
    }


def embed_sentences(model: nn.Module, batch: Batch, pooling: Pooling | None = None) -> Tensor:
    """Return sentence embeddings.

    Args:
        model: The model; a head on it is left out.
        batch: What it reads.
        pooling: How tokens become a sentence; None for the mean over real tokens.

    Returns:
        (B, d) in float64 on the CPU.
    """
    backbone = getattr(model, "base_model", model)
    output = run(backbone, batch.inputs)
    return (pooling or Pooling())(output, batch.inputs.get("attention_mask")).double().cpu()


def predicts_distribution(model: nn.Module, batch: Batch) -> bool:
    """Whether a model puts out logits of classes, a token (B, T, V) or a row (B, C), or of a span."""
    with evaluating(model):
        return bool(logits_of(model, run(model, batch.inputs), batch))


def puts_out_tokens(model: nn.Module, batch: Batch) -> bool:
    """Whether a model, or its body, puts out token embeddings (B, T, d)."""
    with evaluating(model):
        return find_hidden_state(run(getattr(model, "base_model", model), batch.inputs)) is not None


def logits_of(model: nn.Module, output: Any, batch: Batch) -> list[Tensor]:
    """The logits of classes in a model's output: (B, T, V), (B, C), or both ends of a span; none where it has none."""
    ends = (getattr(output, name, None) for name in ("start_logits", "end_logits"))
    span = [logits for logits in ends if isinstance(logits, Tensor) and logits.dim() == 2]
    if len(span) == 2:
        mask = batch.masks().get(span[0].shape[1])
        return span if mask is None else [logits.masked_fill(~mask.to(logits.device), -torch.inf) for logits in span]
    logits = getattr(output, "logits", None)
    problem = head_problem(model)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or problem == "regression":
        return []
    return [logits] if logits.shape[-1] > 1 or problem == MULTI_LABEL else []


def _unit_of(model: nn.Module, logits: list[Tensor]) -> str:
    """What each of the distributions belongs to."""
    if len(logits) > 1:
        return "end of a span"
    if logits[0].dim() == 3:
        return "token"
    return "label" if head_problem(model) == MULTI_LABEL else "example"


def _logits(model: nn.Module, batch: Batch) -> list[Tensor]:
    logits = logits_of(model, run(model, batch.inputs), batch)
    if not logits:
        raise UsageError(
            f"{type(model).__name__} returns no logits of several classes to compare: load it with its head "
            "(AutoModelForCausalLM, ...), compare embeddings, or compare the task scores of a model with one output"
        )
    return logits


def _count_by_example(logits: Tensor, compared: int, batch: Batch) -> Tensor:
    """How many of the compared numbers belong to each example (B,)."""
    rows = len(logits)
    mask = batch.masks().get(logits.shape[1]) if logits.dim() == 3 else None
    return torch.full((rows,), compared // max(rows, 1)) if mask is None else mask.sum(1).cpu()


def compared_logits(logits: Tensor, batch: Batch) -> Tensor:
    """Return the logits that count: (N, V) of real tokens, (B, C) of classifiers."""
    if logits.dim() == 2:
        return logits
    mask = batch.masks().get(logits.shape[1])
    return logits.flatten(0, 1) if mask is None else logits[mask.to(logits.device)]
