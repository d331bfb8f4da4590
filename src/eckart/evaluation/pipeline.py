"""The order of an evaluation: open the models, choose a task, score each model by the same protocol."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from eckart.config import merge_recipe
from eckart.data import require_data
from eckart.errors import CheckpointError, UsageError
from eckart.evaluation.model import EvaluatedModel, open_model
from eckart.evaluation.recipe import EvaluationRecipe
from eckart.evaluation.rounding import round_weights
from eckart.evaluation.scorers.base import EvaluationContext, TaskScorer
from eckart.evaluation.scorers.choose import build_scorer, choose_task
from eckart.evaluation.sizes import Size, count_sizes
from eckart.model import find_sites, preserve_random_state, shared_clone, with_separate_experts
from eckart.progress import Outlook, Stage, describe_count
from eckart.quantization import choose_layers, prepare, quantize, require_torchao
from eckart.speed.latency import measure_latency, time_where_memory_allows
from eckart.storage.layout import model_folder, read_json

logger = logging.getLogger(__name__)

BASELINE_BITS = (8, 4)

LATENCY = "latency"
"""The stage in which a forward pass is timed."""

TIMING = 6.0
"""Seconds that it takes, about."""


def evaluate(
    model: PreTrainedModel | str | Path,
    against: PreTrainedModel | str | Path | None = None,
    tokenizer: Any = None,
    *,
    data: Any = None,
    recipe: EvaluationRecipe | None = None,
    report_progress: Callable[[str], None] = logger.info,
    **options: Any,
) -> dict[str, Any]:
    """Score a model, and the original that it was made from by the same protocol.

    Weights are used as stored and computed with in float32. Models in memory are not changed.

    Args:
        model: in memory, a folder or a hub name; factored or dense.
        against: the original.
        tokenizer: reads the data; None for the one in the model's folder, or in the original's.
        data: a file, folder, hub data set, "stdlib", or rows or text in memory; None for WikiText-2.
        recipe: what is scored and how.
        report_progress: told what is scored, and how long the rest takes.
        **options: fields of :class:`EvaluationRecipe`, such as `task="agreement"` or `device="cpu"`; an option wins
            over the recipe's field.

    Returns:
        `task`, `protocol`, `data`; `scores`: name -> {column: number}; `sizes`: elements, bytes and multiply-adds a
        token -> {column: number}; `latency`: of one forward pass of the original and of the model on random inputs, as
        :func:`eckart.speed.latency.compare_latency` gives it, or None; `device`: where it was computed; `notes`;
        `details`: column -> what lm_eval says of it, where its tasks were asked for. The columns are "original",
        "eckart" ("model" for one that is not factored), "int8", "int4" and "eckart int8", whose rounding is simulated;
        with `quantize`, "original int8" and so on, which do store integers. All plain JSON values.

    Raises:
        EckartError: naming what cannot be read or does not fit.
    """
    if isinstance(data, str | Path):
        options["data"] = str(data)
    recipe = merge_recipe(EvaluationRecipe, recipe, options, "eckart.evaluate")
    with preserve_random_state():
        if recipe.quantize is not None:
            require_torchao()
        require_data(data, recipe.data)
        context = _open(model, against, tokenizer, data, recipe)
        task = choose_task(context)
        scorer = build_scorer(task, context)
        scores: dict[str, dict[str, float]] = {}
        sizes: dict[str, dict[str, int]] = {}
        details: dict[str, Any] = {}
        kind = recipe.quantize
        quantized = {f"{name} {kind}": _quantize(opened, kind) for name, opened in _opened(context) if kind is not None}
        with _announce(context, quantized, task, report_progress) as outlook:
            for column, scored, size in _list_columns(context, quantized):
                outlook.enter(column)
                itself = scorer.compares and column == "original"
                for name, score in ({} if itself else scorer.score(scored)).items():
                    scores.setdefault(name, {})[column] = score
                if scorer.detail:
                    details[column] = scorer.detail
                for name, number in size.as_dict().items():
                    sizes.setdefault(name, {})[column] = number
            outlook.enter(LATENCY)
            latency = _time(context, quantized) if recipe.latency else None
    return {
        "model": context.model.name,
        "against": context.original.name if context.original is not None else None,
        "task": task,
        "protocol": scorer.protocol,
        "data": dict(scorer.data),
        "device": str(context.model.model.device),
        "scores": scores,
        "sizes": sizes,
        "latency": latency,
        **({"details": details} if details else {}),
        "notes": [*scorer.notes, *_list_notes(context, scorer)],
    }


def _announce(context: EvaluationContext, quantized: Quantized, task: str, report: Callable[[str], None]) -> Outlook:
    """Say what is scored; how long that takes is known once the first model is."""
    columns = [*(column for column, _ in _opened(context)), *quantized, *_list_baselines(context, quantized)]
    timed = [Stage(LATENCY, seconds=TIMING)] if context.recipe.latency else []
    report(f"{task} of {describe_count(len(columns), 'model')}: {', '.join(columns)}")
    return Outlook([*(Stage(column, 1) for column in columns), *timed], report, hint=_describe_less(context, task))


def _describe_less(context: EvaluationContext, task: str) -> str:
    """The option that bounds how much is scored, and the one that leaves the rounded models out."""
    amount = {"perplexity": "--max-tokens 50000", "lm-eval": "--limit 100"}.get(task, "--num-samples 200")
    rest = ", without int8 and int4: --no-baselines" if _list_baselines(context, {}) else ""
    return f"less text: {amount}{rest}"


def _open(model: Any, against: Any, tokenizer: Any, data: Any, recipe: EvaluationRecipe) -> EvaluationContext:
    scored = open_model(model, recipe)
    original = open_model(against, recipe) if against is not None else None
    if original is not None and type(original.model) is not type(scored.model):
        raise UsageError(
            f"--against {original.name}: it is a {type(original.model).__name__}, {scored.name} a "
            f"{type(scored.model).__name__}. Give the model that it was made from."
        )
    if tokenizer is None:
        tokenizer = scored.tokenizer or (original.tokenizer if original is not None else None)
    if tokenizer is None:
        raise CheckpointError(
            f"{scored.name} has no tokenizer, and text cannot be read without one. Put the tokenizer's files into the "
            "folder (tokenizer.save_pretrained), or pass tokenizer= in Python."
        )
    return EvaluationContext(recipe, recipe.data if data is None else data, scored, original, tokenizer)


Quantized = Mapping[str, tuple[PreTrainedModel, Size]]
"""Column -> a model with weights in few bits, and its size."""


def _list_columns(context: EvaluationContext, quantized: Quantized) -> Iterator[tuple[str, PreTrainedModel, Size]]:
    """Every model that is scored, by the name of its column; rounded baselines are made when they are reached."""
    for column, opened in _opened(context):
        yield column, opened.model, opened.size
    for column, (model, size) in quantized.items():
        yield column, model, size
    for column, (opened, bits) in _list_baselines(context, quantized).items():
        yield column, *_round(opened, bits)


def _list_baselines(context: EvaluationContext, quantized: Quantized) -> dict[str, tuple[EvaluatedModel, int]]:
    """Column -> what is rounded, and to how many bits."""
    original, scored = context.original, context.model
    found: dict[str, tuple[EvaluatedModel, int]] = {}
    if original is None or not context.recipe.baselines:
        return found
    if not original.factored and not original.quantized:
        found |= {f"int{bits}": (original, bits) for bits in BASELINE_BITS}
    if scored.factored and not scored.quantized and "eckart int8" not in quantized:
        found["eckart int8"] = (scored, 8)
    return found


def _time(context: EvaluationContext, quantized: Quantized) -> dict[str, Any] | None:
    """Latency of the original and the model, and of those in few bits.

    Baselines are not timed: their rounding is simulated, and they compute with floating-point weights.
    """
    recipe = context.recipe
    timed = {name: opened.model for name, opened in _opened(context)}
    timed |= {name: model for name, (model, _) in quantized.items()}
    return time_where_memory_allows(lambda: measure_latency(timed, recipe.batch_size, recipe.max_seq_length))


def _opened(context: EvaluationContext) -> Iterator[tuple[str, EvaluatedModel]]:
    """The original, where there is one, and the model, by the names of their columns."""
    if context.original is not None:
        yield "original", context.original
    yield "eckart" if context.model.factored else "model", context.model


def _round(opened: EvaluatedModel, bits: int) -> tuple[PreTrainedModel, Size]:
    """A model with its weights rounded, dense or factored, and what that takes when stored; the rounding is simulated.

    Factors are made ready for it as they are before they are really rounded.
    """
    model = with_separate_experts(opened.model)
    stored = opened.size
    if opened.factored:
        model = shared_clone(model)
        before = count_sizes(model, dtype=opened.dtype).model.bytes
        prepare(model, "int8")
        counted = count_sizes(model, dtype=opened.dtype).model
        stored = replace(counted, bytes=stored.bytes + counted.bytes - before)
        names = list(choose_layers(model, "int8")[0])
    else:
        names = [site.name for site in find_sites(model).chosen]
    rounded = round_weights(model, names, bits)
    weights = [model.get_submodule(name).get_parameter("weight") for name in names]
    matrices = sum({id(weight): weight.numel() for weight in weights}.values()) * opened.dtype.itemsize
    size = replace(stored, bytes=stored.bytes - matrices + rounded.named_bytes)
    return cast(PreTrainedModel, rounded.model), size


def _quantize(opened: EvaluatedModel, kind: str) -> tuple[PreTrainedModel, Size]:
    """A copy of a model that stores its weights in few bits, and what it takes."""
    if opened.quantized:
        raise UsageError(
            f"{opened.name} is quantized already. Leave --quantize out: it is scored as it is; or name the folder that "
            "it was made from."
        )
    model = shared_clone(with_separate_experts(opened.model))
    quantize(model, kind)
    return model, count_sizes(model, dtype=opened.dtype).model


def _list_notes(context: EvaluationContext, scorer: TaskScorer) -> list[str]:
    """What may mislead: no baselines beside a factored original, and data that the model was calibrated on."""
    notes = []
    original, used = context.original, _calibration_data(context.model.folder)
    if original is not None and context.recipe.baselines and (original.factored or original.quantized):
        what = "factored" if original.factored else "quantized"
        notes.append(f"{original.name} is {what} itself: no int8 and int4 beside it")
    if used.get("source") is not None and all(used.get(key) == scorer.data.get(key) for key in ("source", "split")):
        notes.append(f"this model was calibrated on {used['source']}: its scores on it are better than on other text")
    return notes


def _calibration_data(folder: Path | None) -> Mapping[str, Any]:
    """What the report in a published folder says that the model was calibrated on."""
    for home in (folder, model_folder(folder)) if folder is not None else ():
        file = home / "eckart" / "report.json"
        if file.is_file():
            with suppress(CheckpointError):
                return read_json(file).get("data") or {}
    return {}
