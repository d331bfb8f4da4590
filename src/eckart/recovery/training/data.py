"""The data of a training: tokenized rows to train on, and a scorer on what is held out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.config import DEFAULT_TOKENS
from eckart.data import Batch, Pooling, TaskData, TaskRow, load_data, load_task
from eckart.data.documents import load_documents
from eckart.data.examples import TextExample
from eckart.data.model_kind import ModelKind, pad_token, problem_of, sequence_length
from eckart.data.padding import by_length, collate, encode
from eckart.data.windows import token_stream
from eckart.errors import DataError
from eckart.recovery.training.scorer import (
    Scorer,
    labeled_scorer,
    masked_scorer,
    prediction_scorer,
    sentence_scorer,
    text_scorer,
)

HELD_OUT = 0.1
"""Fraction of the data that is held out where no other data are given to score on."""

MAX_TEXTS = 1_000_000
"""Texts that are read where no number is given."""

SCORING_BATCH = 32
"""Texts of a batch that is scored."""


@dataclass
class TrainingData:
    """What a training reads, and what its model is scored on.

    Attributes:
        rows: tokenized, each a dictionary of lists, with its label where the task has labels.
        scorer: scores a model on what is held out.
        pad_id: fills up short rows.
        description: of the data, as JSON values.
        notes: what was not as asked.
        digests: SHA-256 of the rows, and of what is held out: equal where the same was read, wherever it lies.
        held: tokenized rows that are held out, of tasks with one answer a text; else empty.
    """

    rows: list[dict[str, Any]]
    scorer: Scorer
    pad_id: int
    description: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    held: list[dict[str, Any]] = field(default_factory=list)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of rows, padded on the right."""
        lists = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = collate(lists, self.pad_id)
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def _digests(rows: Iterable[Any], held: Iterable[Any]) -> dict[str, str]:
    """SHA-256 of what is trained on and of what is scored on; plain JSON, in order."""
    found = {}
    for name, entries in (("data", rows), ("eval_data", held)):
        total = hashlib.sha256()
        for entry in entries:
            total.update(json.dumps(entry, sort_keys=True).encode() + b"\n")
        found[name] = total.hexdigest()
    return found


def load_labeled(
    recipe: Any, data: Any, *, model: PreTrainedModel | None, task: str | None, evaluation: bool = False
) -> TaskData:
    """The labeled rows of a recipe, for training or (`evaluation`) for scoring.

    Args:
        recipe: names columns and numbers.
        data: as for :func:`eckart.data.load_task`.
        model: one with a classifier's head says what labels are; None where it will be made for them.
        task: "classification" or "regression"; None to tell by the labels.
        evaluation: whether these are the rows to score on.
    """
    config: Any = model.config if model is not None else None
    return load_task(
        data,
        column=recipe.data_column,
        pair_column=recipe.data_target_column,
        label=recipe.data_label_column,
        label2id=getattr(config, "label2id", None),
        regression=None if task is None else task == "regression",
        multi_label=None if config is None else problem_of(config) == "multi_label_classification",
        outputs=None if config is None else int(config.num_labels),
        config=recipe.data_config,
        split=recipe.eval_split if evaluation else recipe.data_split,
        revision=recipe.data_revision,
        num_samples=recipe.eval_samples if evaluation else recipe.num_samples,
    )


def load_training_data(
    recipe: Any,
    data: Any,
    eval_data: Any,
    task: str,
    model: PreTrainedModel,
    tokenizer: Any,
    rows: TaskData | None,
    *,
    teacher: PreTrainedModel | None = None,
    pooling: Pooling | None = None,
) -> TrainingData:
    """Tokenize what a task is trained on, and hold out what it is scored on.

    Args:
        recipe: names columns, lengths and numbers.
        data: as :func:`eckart.data.load_data` takes them.
        eval_data: other data to score on; None for a tenth of `data`.
        task: "classification", "regression", "masked", "causal", "embedding" or "logits".
        model: the student.
        tokenizer: its tokenizer.
        rows: labeled rows, where they have been read already.
        teacher: whose sentence embeddings or predictions are compared with the student's, in tasks "embedding" and
            "logits".
        pooling: how they are made.

    Raises:
        DataError: the data cannot be read, or leave nothing to train on.
    """
    config: Any = model.config
    length = sequence_length(recipe.max_seq_length, DEFAULT_TOKENS, tokenizer=tokenizer, config=config, model=model)
    if task in ("classification", "regression"):
        assert rows is not None
        return _labeled(recipe, eval_data, task, model, tokenizer, rows, length)
    if task == "embedding":
        assert teacher is not None
        assert pooling is not None
        return _sentences(recipe, data, eval_data, model, tokenizer, length, teacher, pooling)
    if task == "logits":
        assert teacher is not None
        return _predictions(recipe, data, eval_data, model, tokenizer, length, teacher)
    return (_masked if task == "masked" else _causal)(recipe, data, eval_data, model, tokenizer, length)


def _labeled(
    recipe: Any, eval_data: Any, task: str, model: PreTrainedModel, tokenizer: Any, rows: TaskData, length: int
) -> TrainingData:
    config: Any = model.config
    notes = []
    train, held = rows.rows, None
    if eval_data is not None:
        held = load_labeled(recipe, eval_data, model=model, task=task, evaluation=True)
    else:
        train, kept = _split(train, recipe.seed)
        held = TaskData(kept, rows.description)
        notes.append(f"scored on {len(kept)} rows held out of the data; --eval-data gives others")
    encoded, kept_out = (_encode_labeled(part, task, tokenizer, length) for part in (train, held.rows))
    scorer = labeled_scorer(task, tokenizer, held, length)
    scored = ((row.text.text, row.text.pair, row.label) for row in held)
    description = rows.description | {"trained_on": len(train)}
    digests = _digests(encoded, scored)
    return TrainingData(encoded, scorer, pad_token(tokenizer, config), description, notes, digests, kept_out)


def _encode_labeled(rows: Sequence[TaskRow], task: str, tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Tokenized rows with their labels."""
    encoded: list[dict[str, Any]] = list(encode([row.text for row in rows], tokenizer, length))
    for row, source in zip(encoded, rows, strict=True):
        several = isinstance(source.label, list)
        row["labels"] = source.label if several or task == "classification" else float(source.label)  # type: ignore[arg-type]
    return encoded


def _masked(
    recipe: Any, data: Any, eval_data: Any, model: PreTrainedModel, tokenizer: Any, length: int
) -> TrainingData:
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise DataError("tokenizer: it has no mask token, so no token can be masked: use --task causal, or its own")

    rows, held, description, notes = _texts(recipe, data, eval_data, model, tokenizer, length)
    pad_id = pad_token(tokenizer, model.config)
    groups = by_length([len(row["input_ids"]) for row in held], SCORING_BATCH)
    scorer = masked_scorer(
        tokenizer,
        [collate([held[i] for i in group], pad_id) for group in groups],
        recipe.seed,
    )
    return TrainingData(rows, scorer, pad_id, description | {"trained_on": len(rows)}, notes, _digests(rows, held))


def _sentences(
    recipe: Any,
    data: Any,
    eval_data: Any,
    model: PreTrainedModel,
    tokenizer: Any,
    length: int,
    teacher: PreTrainedModel,
    pooling: Pooling,
) -> TrainingData:
    if recipe.max_seq_length is None and pooling.max_seq_length is not None:
        length = min(length, pooling.max_seq_length)
    rows, held, description, notes = _texts(recipe, data, eval_data, model, tokenizer, length, pooling)
    pad_id = pad_token(tokenizer, model.config)
    groups = by_length([len(row["input_ids"]) for row in held], SCORING_BATCH)
    batches = [Batch(collate([held[i] for i in group], pad_id), tuple(group)) for group in groups]
    description |= {"trained_on": len(rows), "pooling": list(pooling.modes)}
    scorer = sentence_scorer(teacher, batches, pooling)
    return TrainingData(rows, scorer, pad_id, description, notes, _digests(rows, held))


def _predictions(
    recipe: Any,
    data: Any,
    eval_data: Any,
    model: PreTrainedModel,
    tokenizer: Any,
    length: int,
    teacher: PreTrainedModel,
) -> TrainingData:
    rows, held, description, notes = _texts(recipe, data, eval_data, model, tokenizer, length, kind=None)
    pad_id = pad_token(tokenizer, model.config)
    groups = by_length([len(row["input_ids"]) for row in held], SCORING_BATCH)
    batches = [Batch(collate([held[i] for i in group], pad_id), tuple(group)) for group in groups]
    scorer = prediction_scorer(teacher, batches)
    described = description | {"trained_on": len(rows)}
    return TrainingData(rows, scorer, pad_id, described, notes, _digests(rows, held), held)


def _texts(
    recipe: Any,
    data: Any,
    eval_data: Any,
    model: PreTrainedModel,
    tokenizer: Any,
    length: int,
    pooling: Pooling | None = None,
    kind: ModelKind | None = "encoder",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any], list[str]]:
    """Texts without labels, tokenized: to train on, held out, what they are, and notes.

    They are separate, or what the model reads if `kind` is None: windows, pairs.
    """

    def read(source: Any, split: str, count: int | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        loaded = load_data(
            source, tokenizer=tokenizer, model=model, config=recipe.data_config, split=split,
            column=recipe.data_column, target_column=recipe.data_target_column, revision=recipe.data_revision,
            num_samples=count or MAX_TEXTS, max_seq_length=length, batch_size=1, seed=recipe.seed, kind=kind,
            pooling=pooling,
        )  # fmt: skip
        found = sorted(loaded, key=lambda batch: batch.examples)
        texts = [{name: value[0].tolist() for name, value in b.inputs.items() if name != "labels"} for b in found]
        return texts, loaded.description

    rows, description = read(data, recipe.data_split, recipe.num_samples)
    if eval_data is not None:
        held, _ = read(eval_data, recipe.eval_split, recipe.eval_samples)
        return rows, held, description, []
    rows, held = _split(rows, recipe.seed)
    return rows, held, description, [f"scored on {len(held)} texts held out of the data; --eval-data gives others"]


def _causal(
    recipe: Any, data: Any, eval_data: Any, model: PreTrainedModel, tokenizer: Any, length: int
) -> TrainingData:
    def read(source: Any, split: str) -> tuple[list[str], dict[str, Any]]:
        return load_documents(
            source, tokenizer=tokenizer, config=recipe.data_config, split=split, column=recipe.data_column,
            revision=recipe.data_revision,
        )  # fmt: skip

    texts, description = read(data, recipe.data_split)
    notes = []
    if eval_data is not None:
        held, _ = read(eval_data, "held" if eval_data == "stdlib" else recipe.eval_split)
    elif len(texts) == 1:
        cut = int(len(texts[0]) * (1 - HELD_OUT))
        texts, held = [texts[0][:cut]], [texts[0][cut:]]
        notes.append("scored on the last tenth of the text, held out; --eval-data gives another")
    else:
        texts, held = _split(texts, recipe.seed)
        notes.append(f"scored on {len(held)} documents held out of the data; --eval-data gives others")
    documents = [TextExample(text, "data", place) for place, text in enumerate(texts)]
    stream, _, _ = token_stream(documents, tokenizer, enough=sum(map(len, texts)) + 2 * len(texts), joined=False)
    length = min(length, len(stream))
    if length < 2:
        raise DataError("data: not two tokens of text to train on: pass more text")
    windows = stream[: len(stream) // length * length].view(-1, length)
    if recipe.num_samples is not None and len(windows) > recipe.num_samples:
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))
        windows = windows[order[: recipe.num_samples].sort().values]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * length, "labels": row.tolist()} for row in windows]
    scorer = text_scorer(tokenizer, held, length, recipe.eval_samples)
    described = description | {"trained_on": len(rows), "tokens": windows.numel()}
    pad_id = pad_token(tokenizer, model.config)
    return TrainingData(rows, scorer, pad_id, described, notes, _digests(rows, held))


def _split(rows: list[Any], seed: int) -> tuple[list[Any], list[Any]]:
    """Hold a tenth out, by a seeded draw; both in the order of the data."""
    if len(rows) < 2:
        raise DataError("data: one row leaves none to score on: pass more rows, or --eval-data")
    count = math.ceil(HELD_OUT * len(rows))
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    held = set(drawn)
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]
