"""What a compressed model is worth: its own scores, and beside them the original's and those of plain rounding."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.checkpoint.load import load
from eckart.checkpoint.source import resolve
from eckart.checkpoint.stored import stored_dtype, stored_size, stored_tensors
from eckart.checkpoint.tokenizer import load_tokenizer
from eckart.config import DEFAULT_BATCH_SIZE, DEFAULT_TOKENS, resolve_device
from eckart.data import CalibrationData, Pooling, load_data, load_task, model_kind
from eckart.data.documents import load_documents
from eckart.errors import CheckpointError, UsageError
from eckart.evaluation.agreement import compare_embeddings, compare_predictions
from eckart.evaluation.perplexity import measure_perplexity
from eckart.evaluation.rounding import round_weights
from eckart.evaluation.sizes import count_sizes
from eckart.evaluation.tasks import score_classification, score_regression, score_similarity
from eckart.model import factored_modules, find_sites, has_output_head, with_separate_experts
from eckart.storage.layout import model_folder, read_json

TASKS = ("perplexity", "classification", "regression", "similarity", "agreement", "embedding")
AGREEMENT_TOKENS = 16_384
"""Of the text of a perplexity, so many tokens are also compared with the original position by position."""

Scores = dict[str, float]


@dataclass(frozen=True)
class Asked:
    """What to evaluate on, and how.

    Attributes:
        task: one of :data:`TASKS`; None for what fits the model and the data.
        data: a file, folder, hub data set or "stdlib"; None for WikiText-2.
        data_config: of the hub data set.
        data_split: of the hub data set; None for "test", and "held" of "stdlib".
        data_column: the text.
        data_target_column: the second text of a pair, or the target of an encoder-decoder.
        data_label_column: the label or score.
        data_revision: of the hub data set.
        max_seq_length: tokens a window or text.
        max_tokens: only the first so many tokens of running text.
        num_samples: only the first so many rows of a task.
        batch_size: texts or windows at a time.
        baselines: whether to score plain rounding to int8 and int4 as well, where there is an original.
    """

    task: str | None = None
    data: Any = None
    data_config: str | None = None
    data_split: str | None = None
    data_column: str | None = None
    data_target_column: str | None = None
    data_label_column: str | None = None
    data_revision: str | None = None
    max_seq_length: int | None = None
    max_tokens: int | None = None
    num_samples: int | None = None
    batch_size: int | None = None
    baselines: bool = True


@dataclass
class _Model:
    """A loaded model and what its files store."""

    folder: Path
    model: PreTrainedModel
    tokenizer: Any
    dtype: torch.dtype
    elements: int
    bytes: int
    multiply_adds: int

    @property
    def size(self) -> dict[str, int]:
        return {"elements": self.elements, "bytes": self.bytes, "multiply_adds": self.multiply_adds}


@dataclass
class _Scorer:
    """How one model is scored; `against` says that the score compares with the original."""

    score: Callable[[PreTrainedModel], Scores]
    data: Mapping[str, Any]
    protocol: str
    against: bool = False
    notes: list[str] = field(default_factory=list)


def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    asked: Asked | None = None,
    *,
    device: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score a model folder, and its original by the same protocol.

    Weights are used as stored and computed with in float32 on the CPU.

    Args:
        model: a folder or hub name, factored or dense.
        against: the original.
        asked: what on; or give the fields of :class:`Asked` as keyword arguments.
        device: where to compute.
        **options: see `asked`.

    Returns:
        `task`, `protocol`, `data`; `scores`: name -> {column: number}; `sizes`: elements, bytes and multiply-adds a
        token -> {column: number}; `notes`. The columns are "original", "eckart" ("model" for one that is not
        factored), "int8" and "int4". All plain JSON values.

    Raises:
        EckartError: naming what cannot be read or does not fit.
    """
    asked = asked if asked is not None else Asked(**options)
    if asked.task is not None and asked.task not in TASKS:
        raise UsageError(f"--task {asked.task}: choose one of {', '.join(TASKS)}.")
    mine = _open(model, device)
    original = _open(against, device) if against is not None else None
    if original is not None and type(original.model) is not type(mine.model):
        raise UsageError(
            f"--against {against}: it is a {type(original.model).__name__}, {model} a {type(mine.model).__name__}. "
            "Give the model that it was made from."
        )
    tokenizer = mine.tokenizer or (original.tokenizer if original is not None else None)
    if tokenizer is None:
        raise CheckpointError(
            f"{mine.folder} has no tokenizer, and there is nothing to read text with. Put the tokenizer's files into "
            "the folder: tokenizer.save_pretrained(...)."
        )
    task = asked.task or _fitting(mine.model, asked, original is not None)
    scorer = _scorer(task, asked, mine, original, tokenizer)
    own = "eckart" if factored_modules(mine.model) else "model"
    notes = scorer.notes + _calibrated_on(mine.folder, scorer.data)
    scores: dict[str, dict[str, float]] = {}
    table: dict[str, dict[str, int]] = {}

    def enter(column: str, values: Scores, size: dict[str, int]) -> None:
        for name, value in values.items():
            scores.setdefault(name, {})[column] = value
        for name, number in size.items():
            table.setdefault(name, {})[column] = number

    if original is not None:
        enter("original", {} if scorer.against else scorer.score(original.model), original.size)
    enter(own, scorer.score(mine.model), mine.size)
    if original is not None and asked.baselines:
        if factored_modules(original.model):
            notes.append(f"{original.folder} is factored itself: no int8 and int4 beside it")
        else:
            for bits in (8, 4):
                with _rounded(original, bits) as (rounded, size):
                    enter(f"int{bits}", scorer.score(rounded), size)
    return {
        "model": str(model),
        "against": str(against) if against is not None else None,
        "task": task,
        "protocol": scorer.protocol,
        "data": dict(scorer.data),
        "scores": scores,
        "sizes": table,
        "notes": notes,
    }


def _open(model: str | Path, device: str | None) -> _Model:
    folder = resolve(str(model))
    tensors = stored_tensors(folder)
    dtype = stored_dtype(tensors) or torch.float32
    loaded = load(folder, dtype=torch.float32)
    loaded.to(resolve_device(device))  # type: ignore[arg-type]
    return _Model(
        folder, loaded, load_tokenizer(folder), dtype, *stored_size(tensors), count_sizes(loaded).model.multiply_adds
    )


@contextmanager
def _rounded(original: _Model, bits: int) -> Iterator[tuple[PreTrainedModel, dict[str, int]]]:
    """The original with all its sites rounded, and what that would take when stored."""
    model = with_separate_experts(original.model)
    sites = find_sites(model).chosen
    quantized = round_weights(model, [site.name for site in sites], bits)
    matrices = sum(site.elements for site in sites) * original.dtype.itemsize
    assert isinstance(quantized.model, PreTrainedModel)
    yield quantized.model, {**original.size, "bytes": original.bytes - matrices + quantized.named_bytes}


def _fitting(model: PreTrainedModel, asked: Asked, compared: bool) -> str:
    """The task that fits the model and the data.

    Raises:
        UsageError: if all that fits is a comparison, and there is nothing to compare with.
    """
    if type(model).__name__.endswith("ForSequenceClassification"):
        if asked.data_label_column is not None or asked.data is not None:
            return "regression" if model.config.num_labels == 1 else "classification"
    elif model_kind(model.config, model) == "causal" and has_output_head(model):
        return "perplexity"
    elif not has_output_head(model) and asked.data_target_column is not None and asked.data_label_column is not None:
        return "similarity"
    found = "agreement" if has_output_head(model) else "embedding"
    if not compared:
        raise UsageError(
            f"{type(model).__name__} is scored by comparison with the original, or on labeled rows: pass --against "
            "MODEL, or --data FILE with --data-column, --data-target-column (pairs) and --data-label-column."
        )
    return found


def _scorer(task: str, asked: Asked, mine: _Model, original: _Model | None, tokenizer: Any) -> _Scorer:
    if asked.data == "self":
        raise UsageError("--data self: a model's own text says little of its quality. Pass a file or a data set.")
    if task in ("agreement", "embedding") and original is None:
        raise UsageError(f"--task {task} compares with the original: pass --against MODEL.")
    if task == "perplexity":
        return _perplexity(asked, mine, original, tokenizer)
    if task in ("classification", "regression", "similarity"):
        return _labeled(task, asked, mine, tokenizer)
    assert original is not None
    loaded = _batches(asked, mine, tokenizer)
    return _compared(task, loaded, original, _pooling(mine))


def _perplexity(asked: Asked, mine: _Model, original: _Model | None, tokenizer: Any) -> _Scorer:
    texts, described = load_documents(
        asked.data,
        tokenizer=tokenizer,
        config=asked.data_config,
        split=asked.data_split,
        column=asked.data_column,
        revision=asked.data_revision,
        max_characters=12 * asked.max_tokens if asked.max_tokens is not None else None,
    )
    options: dict[str, Any] = {"window": asked.max_seq_length, "max_tokens": asked.max_tokens}
    size = asked.batch_size or DEFAULT_BATCH_SIZE
    scorer = _Scorer(lambda model: {}, described, "")

    def score(model: PreTrainedModel) -> Scores:
        values = measure_perplexity(model, tokenizer, texts, batch_size=size, **options)
        scorer.protocol = f"{values['tokens']} tokens scored; {values['protocol']}"
        found = {"perplexity": values["perplexity"], "bits per byte": values["bits_per_byte"]}
        if values["nonfinite_tokens"]:
            scorer.notes.append(f"{values['nonfinite_tokens']} tokens have a likelihood that is not finite")
        if original is not None and model is not original.model:
            found |= _agreement(model, original.model, windows())
        return found

    cut: list[CalibrationData] = []

    def windows() -> CalibrationData:
        if not cut:
            length = asked.max_seq_length
            count = max(1, min(asked.max_tokens or AGREEMENT_TOKENS, AGREEMENT_TOKENS) // (length or DEFAULT_TOKENS))
            cut.append(
                load_data(
                    texts, tokenizer=tokenizer, model=mine.model, max_seq_length=length, batch_size=size,
                    num_samples=count,
                )
            )  # fmt: skip
        return cut[0]

    scorer.score = score
    return scorer


def _labeled(task: str, asked: Asked, mine: _Model, tokenizer: Any) -> _Scorer:
    if asked.data is None:
        raise UsageError(f"--task {task} needs labeled rows: pass --data FILE with --data-label-column.")
    config = mine.model.config
    rows = load_task(
        asked.data,
        column=asked.data_column,
        pair_column=asked.data_target_column,
        label=asked.data_label_column,
        label2id=getattr(config, "label2id", None),
        regression=task != "classification",
        config=asked.data_config,
        split=asked.data_split or "test",
        revision=asked.data_revision,
        num_samples=asked.num_samples,
    )
    options: dict[str, Any] = {"batch_size": asked.batch_size or 32, "max_seq_length": asked.max_seq_length}
    pooling = _pooling(mine)

    def score(model: PreTrainedModel) -> Scores:
        if task == "classification":
            values = score_classification(model, tokenizer, rows, **options)
            return {"accuracy": values["accuracy"], "F1": values["f1"], "Matthews": values["matthews"]}
        if task == "regression":
            values = score_regression(model, tokenizer, rows, **options)
        else:
            values = score_similarity(model, tokenizer, rows, pooling, **options)
        return {"Spearman": values["spearman"], "Pearson": values["pearson"]}

    what = {
        "classification": "F1 of class 1 for two classes, the macro mean for more",
        "regression": "the head's output against the gold score",
        "similarity": "cosine of the two embeddings against the gold score",
    }[task]
    return _Scorer(score, rows.description, f"{len(rows)} rows; {what}")


def _batches(asked: Asked, mine: _Model, tokenizer: Any) -> CalibrationData:
    default = "held" if asked.data == "stdlib" else "test"
    return load_data(
        asked.data,
        tokenizer=tokenizer,
        model=mine.model,
        config=asked.data_config,
        split=asked.data_split or default,
        column=asked.data_column,
        target_column=asked.data_target_column,
        revision=asked.data_revision,
        num_samples=asked.num_samples,
        max_seq_length=asked.max_seq_length,
        batch_size=asked.batch_size,
    )


def _compared(task: str, loaded: CalibrationData, original: _Model, pooling: Pooling | None) -> _Scorer:
    def score(model: PreTrainedModel) -> Scores:
        if task == "agreement":
            return _agreement(model, original.model, loaded)
        values = compare_embeddings(model, original.model, loaded, pooling)
        return {"1 - cosine to the original": values["cosine_distance"], "worst 1 - cosine": values["worst"]}

    protocol = f"{loaded.num_examples} examples, {loaded.num_tokens} tokens, each held against the original"
    return _Scorer(score, loaded.description, protocol, against=True)


def _agreement(model: PreTrainedModel, original: PreTrainedModel, loaded: CalibrationData) -> Scores:
    values = compare_predictions(model, original, loaded)
    return {"KL to the original (nats)": values["kl"], "same most likely": values["top1"]}


def _pooling(mine: _Model) -> Pooling | None:
    return Pooling.from_folder(mine.folder) if not has_output_head(mine.model) else None


def _calibrated_on(folder: Path, data: Mapping[str, Any]) -> list[str]:
    """A note where the model was calibrated on what it is scored on."""
    home = model_folder(folder)
    file = next((place / "eckart" / "report.json" for place in (folder, home)
                 if (place / "eckart" / "report.json").is_file()), None)  # fmt: skip
    if file is None:
        return []
    try:
        used = read_json(file).get("data") or {}
    except (CheckpointError, json.JSONDecodeError):
        return []
    if used.get("source") is not None and all(used.get(key) == data.get(key) for key in ("source", "split")):
        return [f"{used['source']} is what this model was calibrated on: the score flatters it"]
    return []


def difference(scores: Mapping[str, float], column: str) -> float | None:
    """A column minus the original, or None where one of them is missing."""
    if "original" not in scores or column not in scores:
        return None
    found = scores[column] - scores["original"]
    return found if math.isfinite(found) else None
