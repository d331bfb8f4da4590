"""Run a model over calibration data and gather what the metrics ask for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.data import Batch, CalibrationData, Pooling, kind_of
from eckart.data.inference import device_of, evaluating, forward, progress
from eckart.errors import EckartError, ModelError, NumericalError
from eckart.moments import Moments, Step, common_calls, gather, labelled_loss, sampled_loss, shared_inputs

logger = logging.getLogger(__name__)


@dataclass
class Calibration:
    """What the data said about the sites.

    Attributes:
        groups: leader -> members: sites that share an input, in order of the forward pass.
        moments: site -> statistics; sites that no token reached are absent.
        unreached: sites that no token reached, or whose output the loss does not depend on -> why.
        curvature: "sampled", "labels" or "none".
        common: sites that are also called on what all examples of a batch share, such as relative positions.
        backward_failed: why no backward pass ran, or None.
        notes: fallbacks taken.
    """

    groups: dict[str, tuple[str, ...]]
    moments: dict[str, Moments]
    unreached: dict[str, str]
    curvature: str
    common: frozenset[str] = frozenset()
    backward_failed: str | None = None
    notes: list[str] = field(default_factory=list)


def calibrate(
    model: PreTrainedModel,
    names: Sequence[str],
    data: CalibrationData,
    *,
    needs: frozenset[str],
    curvature: str = "auto",
    seed: int = 0,
    pooling: Pooling | None = None,
    may_fall_back: bool = False,
) -> Calibration:
    """Gather moments of the named modules.

    Args:
        model: the model.
        names: sites.
        data: batches.
        needs: statistics the metric reads, see :class:`eckart.methods.Method`.
        curvature: "auto" (own labels where the data has them, else draws), "sampled" or "labels".
        seed: of the draws.
        pooling: how sentence embeddings are made, for embedding models.
        may_fall_back: gather input Grams alone, with a note, where no backward pass runs.

    Returns:
        The statistics and what was not reached.

    Raises:
        NumericalError: on values that are not finite, naming site and batch.
        ModelError: if a backward pass is needed, cannot run, and nothing may replace it.
    """
    backward = bool(needs & {"gradients", "fisher"})
    labelled = backward and (curvature == "labels" or (curvature == "auto" and data.has_labels))
    step = _labelled_step(model) if labelled else _sampled_step(model, seed, pooling) if backward else _plain(model)
    failed: str | None = None
    with evaluating(model):
        first = data.batches[0].rows(0, 1)
        groups = shared_inputs(model, names, lambda: forward(model, first.inputs))
        common = _common_calls(model, names, first)
        if backward:
            failed = _why_no_backward(model, groups, first, step, needs)
        if failed is not None:
            if not may_fall_back:
                raise ModelError(
                    f"{type(model).__name__}: no backward pass runs through it ({failed}). "
                    "Use a method that needs none: --method drone --allocation uniform."
                )
            backward, labelled, step, needs = False, False, _plain(model), frozenset({"gram"})
        runs = data.batches if not common else [b.rows(i, i + 1) for b in data.batches for i in range(len(b))]
        batches: Iterable[Batch] = progress(runs, what="calibrating", total=len(runs))
        moments = gather(model, groups, batches, step, needs=needs, common=common)
    unreached = {name: "no token of the calibration data reached it" for name in names if name not in moments}
    for name, entry in list(moments.items()):
        if entry.inputs.count == 0:
            unreached[name] = "no token of the calibration data reached it"
        elif backward and _without_gradient(entry):
            unreached[name] = "the model's output does not depend on it"
        else:
            continue
        del moments[name]
    notes = _too_few(moments)
    if failed is not None:
        notes.append(
            f"no backward pass runs through {type(model).__name__} ({failed}): "
            "the drone metric and uniform ranks took the place of kfac and allocation by loss"
        )
        logger.warning(notes[-1])
    return Calibration(
        groups, moments, unreached, _curvature_name(backward, labelled), frozenset(common), failed, notes
    )


def _too_few(moments: Mapping[str, Moments]) -> list[str]:
    """A note where sites saw fewer tokens than they have features: their Grams are singular."""
    few = [entry.inputs for entry in moments.values() if entry.inputs.count < entry.inputs.width]
    if not few:
        return []
    least, widest = min(i.count for i in few), max(i.width for i in few)
    note = (
        f"sites that saw fewer tokens than they have features: {len(few)} (as few as {least} for {widest}); what "
        "the text does not show is kept by plain SVD; give more text with --num-samples"
    )
    logger.warning(note)
    return [note]


def hold_out(loaded: CalibrationData, count: int) -> tuple[CalibrationData, CalibrationData | None]:
    """Take `count` batches, evenly spaced, away from the calibration data, to measure on.

    Args:
        loaded: all batches.
        count: how many to hold out; 0 for none.

    Returns:
        The batches to calibrate on and the others, each with its description.
    """
    if count == 0:
        return loaded, None
    step = len(loaded) / count
    chosen = {int(step * (i + 0.5)) for i in range(count)}
    parts = [[batch for i, batch in enumerate(loaded.batches) if (i in chosen) == held] for held in (False, True)]
    description = {
        **loaded.description,
        "calibration_examples": sum(len(batch) for batch in parts[0]),
        "calibration_tokens": sum(batch.num_tokens for batch in parts[0]),
        "held_out_examples": sum(len(batch) for batch in parts[1]),
    }
    return CalibrationData(parts[0], description), CalibrationData(parts[1], description)


def _common_calls(model: PreTrainedModel, names: Sequence[str], first: Batch) -> dict[str, frozenset[int]]:
    """Calls on what the examples of a batch have in common, found by running one example and the same one twice."""
    twice = {k: torch.cat([v, v]) if v.dim() and len(v) == len(first) else v for k, v in first.inputs.items()}
    return common_calls(model, names, lambda: forward(model, first.inputs), lambda: forward(model, twice))


def _why_no_backward(
    model: PreTrainedModel, groups: Mapping[str, Sequence[str]], batch: Batch, step: Step, needs: frozenset[str]
) -> str | None:
    """Try one example; what stopped it, or None. Errors about numbers or data are raised as they are."""
    try:
        gather(model, groups, [batch], step, needs=needs)
    except EckartError:
        raise
    except Exception as error:  # whatever a model's own code raises
        return f"{type(error).__name__}: {error}"
    return None


def _curvature_name(backward: bool, labelled: bool) -> str:
    return "none" if not backward else "labels" if labelled else "sampled"


def _without_gradient(entry: Moments) -> bool:
    if entry.gradients is not None:
        return entry.gradients.gram is None or not bool(entry.gradients.gram.any())
    fisher = entry.fisher
    return fisher is not None and (fisher.rows is None or not bool(fisher.rows.any()))


def _plain(model: PreTrainedModel) -> Step:
    def step(batch: Batch) -> Tensor | None:
        forward(model, batch.inputs)
        return None

    return step


def _sampled_step(model: PreTrainedModel, seed: int, pooling: Pooling | None) -> Step:
    problem = _problem(model)
    device = device_of(model)

    def step(batch: Batch) -> Tensor | None:
        outputs = forward(model, batch.inputs)
        mask = batch.inputs.get("attention_mask")
        masks = {length: mask.to(device) for length, mask in batch.masks().items()}
        loss = sampled_loss(outputs, masks, batch.examples, seed, pooling=pooling, attention_mask=mask, problem=problem)
        return _finite(loss, batch)

    return step


def _labelled_step(model: PreTrainedModel) -> Step:
    shifted = kind_of(model.config, model) == "causal"

    def step(batch: Batch) -> Tensor | None:
        labels = batch.inputs.get("labels")
        if labels is None:  # a language model's labels are its own text; causal models shift by themselves
            labels = batch.inputs["input_ids"].clone()
            mask = batch.inputs.get("attention_mask")
            if mask is not None:
                labels[~mask.bool()] = -100
        labels = labels.to(device_of(model))
        return _finite(labelled_loss(forward(model, batch.inputs, labels=labels), labels, shifted=shifted), batch)

    return step


def _finite(loss: Tensor, batch: Batch) -> Tensor:
    if not bool(torch.isfinite(loss)):
        raise NumericalError(
            f"calibration examples {batch.examples[0]} to {batch.examples[-1]}: the loss is {float(loss)}. "
            "Load the model in float32 or bfloat16, or look at this text."
        )
    return loss


def _problem(model: PreTrainedModel) -> str | None:
    """Return "regression" or "multi_label_classification" where the head is one."""
    config = model.config
    if "ForSequenceClassification" not in type(model).__name__:
        return None
    if getattr(config, "problem_type", None) is not None:
        return config.problem_type if config.problem_type != "single_label_classification" else None
    return "regression" if getattr(config, "num_labels", 2) == 1 else None
