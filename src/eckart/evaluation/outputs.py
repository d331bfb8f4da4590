"""How closely a model follows its original in outputs of any kind: two towers, boxes, maps, scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eckart.data.batch import Batch
from eckart.data.inference import evaluating, progress, run
from eckart.errors import DataError, UsageError
from eckart.moments import run_in_halves


def compare_outputs(
    model: nn.Module, reference: nn.Module, batches: Iterable[Batch], *, disable: bool | None = None
) -> dict[str, Any]:
    """Compare every output of two models that has a row for each example.

    Args:
        model: the compressed model.
        reference: the original.
        batches: what both read, without labels.
        disable: True for no progress bar.

    Returns:
        `cosine_distance`: mean of 1 - cosine over rows and outputs, real tokens alone; `worst`: the largest;
        `outputs`: their names; `sentences`: rows; `finite`: False where a value is not, which is kept.

    Raises:
        UsageError: the models put out no numbers, or of different shapes.
        DataError: there is nothing to compare.
    """
    distances: dict[str, list[Tensor]] = {}
    rows = 0

    def compare_batch(batch: Batch) -> tuple[int, dict[str, Tensor]]:
        mine, truth = (dict(list_outputs(run(each, batch.inputs), batch)) for each in (model, reference))
        shapes = [{name: tuple(value.shape) for name, value in found.items()} for found in (mine, truth)]
        if shapes[0] != shapes[1] or not mine:
            raise UsageError(
                f"the outputs of {type(model).__name__} cannot be compared: {shapes[0] or 'none'}, and "
                f"{shapes[1] or 'none'} of the original. Compare a model with the one it was made from, by scores "
                "of its own task."
            )
        return len(batch), {
            name: 1 - nn.functional.cosine_similarity(value, truth[name], dim=-1) for name, value in mine.items()
        }

    with evaluating(model, reference):
        for size, found in run_in_halves(progress(batches, what="outputs", disable=disable), compare_batch):
            rows += size
            for name, values in found.items():
                distances.setdefault(name, []).append(values)
    if not rows:
        raise DataError("batches: nothing to compare: pass batches that hold some")
    means = [torch.cat(found).mean() for found in distances.values()]
    worst = max(float(torch.cat(found).max()) for found in distances.values())
    mean = float(torch.stack(means).mean())
    finite = all(bool(torch.isfinite(torch.cat(found)).all()) for found in distances.values())
    return {"cosine_distance": mean, "worst": worst, "outputs": list(distances), "sentences": rows, "finite": finite}


def list_outputs(output: Any, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Yield the outputs with a row for each example: name, and values (B, d) in float64 on the CPU, padding 0.

    An output of one number a row is one row of all of them.
    """
    if isinstance(output, Tensor):
        output = {"output": output}
    named = output.items() if isinstance(output, Mapping) else ((str(i), value) for i, value in enumerate(output))
    masks = batch.masks()
    for name, value in named:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
            continue
        if len(value) != len(batch):
            continue
        value = value.detach().double().cpu()
        mask = masks.get(value.shape[1]) if value.dim() == 3 else None
        if mask is not None and len(mask) == len(value):
            value = value.masked_fill(~mask[..., None], 0)
        value = value.flatten(1) if value.dim() > 1 else value[:, None]
        yield name, value if value.shape[1] > 1 else value.mT
