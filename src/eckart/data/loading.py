"""Calibration data, whatever they come as."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from eckart.config import DEFAULT_BATCH_SIZE, DEFAULT_TEXTS, DEFAULT_TOKENS, default_samples
from eckart.data.batch import CalibrationData
from eckart.data.columns import TextExample, find_label_column, find_text_column, peek_rows, require_column, text_of
from eckart.data.model_kind import ModelKind, model_kind, pad_token, sequence_length
from eckart.data.padding import encoder_batches, seq2seq_batches, shift_of
from eckart.data.ready import digest_batches, is_ready, ready_batches
from eckart.data.rows import DataRow
from eckart.data.self_sampled import sample_windows
from eckart.data.source import RowSource, first_item, open_source
from eckart.data.task import labels_of
from eckart.data.windows import POOL, choose_windows, token_stream, window_batches
from eckart.errors import DataError, UsageError

logger = logging.getLogger(__name__)


def load_data(
    data: Any,
    *,
    tokenizer: Any = None,
    model: PreTrainedModel | None = None,
    model_config: PretrainedConfig | None = None,
    config: str | None = None,
    split: str = "train",
    column: str | None = None,
    target_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    num_samples: int | None = None,
    max_seq_length: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    kind: ModelKind | None = None,
    disable: bool | None = None,
) -> CalibrationData:
    """Load calibration data.

    Causal models get windows of packed text, encoders separate texts padded batch by batch, encoder-decoders pairs
    of source and target.

    Args:
        data: A .txt, .jsonl, .csv or .tsv file, a folder of such files, "stdlib" (the source of Python's library),
            "self" (text that a causal model samples), a hub identifier, a `datasets.Dataset`, an iterable of
            strings, rows or chats, or an iterable of model-ready batches. None for WikiText-2 from the hub.
        tokenizer: The model's tokenizer; needed for everything but model-ready batches.
        model: The model: needed for "self"; otherwise it settles what the configuration leaves open.
        model_config: Its configuration, where the model itself is not at hand.
        config: The hub data set's configuration.
        split: The hub data set's split.
        column: The column that holds text or chat messages.
        target_column: A second column: the other half of a sentence pair for encoders, the target for
            encoder-decoders.
        label_column: The label, for models with a classification or regression head.
        revision: The hub data set's revision.
        num_samples: Windows (128 by default) or texts (1,024); of ready batches, rows (all, or 1,024 where their
            number is not known).
        max_seq_length: Tokens a window or text: 512 by default, never more than the model has positions for.
        batch_size: Rows a batch, 8 by default; ready batches stay as they are.
        seed: Of the choice among more data than are wanted, and of what "self" draws.
        kind: What the model is to read; None for what its class says.
        disable: No progress bar.

    Returns:
        Batches on the CPU, and what they were made from.

    Raises:
        UsageError: If the data asked for do not fit the model.
        DataError: If they cannot be had or read, or hold nothing.
    """
    for name, value in (
        ("num_samples", num_samples),
        ("max_seq_length", max_seq_length),
        ("batch_size", batch_size),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name}: {value!r} is not a whole number above 0: pass one, or None for the default")
    if isinstance(data, CalibrationData):
        return data
    model_config = model_config if model_config is not None else getattr(model, "config", None)
    first, data = first_item(data)
    if is_ready(first):
        return _ready(data, model, model_config, tokenizer, num_samples)
    if tokenizer is None:
        raise UsageError("tokenizer: text needs one: pass the model's tokenizer, or model-ready batches")
    if model_config is None:
        raise UsageError("model_config: it tells how text is cut up: pass the model or its configuration")

    kind = kind or model_kind(model_config, model)
    if label_column is not None and kind != "encoder":
        raise UsageError(
            f"label_column: {model_config.model_type} has no classification head: leave it out, or load the model with "
            "AutoModelForSequenceClassification"
        )
    if target_column is not None and kind == "causal":
        raise UsageError("target_column: a causal model reads one text: put both into one column, or leave it out")
    count = num_samples or default_samples(kind)
    length = sequence_length(max_seq_length, DEFAULT_TOKENS, tokenizer=tokenizer, config=model_config, model=model)
    size = batch_size or DEFAULT_BATCH_SIZE
    settings: dict[str, Any] = {"kind": kind, "max_seq_length": length, "seed": seed}

    if isinstance(data, str) and data == "self":
        return _self(model, kind, tokenizer, count, length, size, settings, disable)
    asked = tuple(name for name in (column, target_column, label_column) if name is not None)
    source = open_source(
        data,
        config=config,
        split=split,
        revision=revision,
        asked=asked,
        whole_text=kind == "causal",
        seed=seed,
    )
    head, source.rows = peek_rows(source.rows, source.name)
    column = column or source.column
    column = find_text_column(head, source.name, asked=column, taken=(target_column, label_column))
    if target_column is not None:
        require_column(target_column, head, source.name)
    if label_column is not None:
        find_label_column(head, source.name, asked=label_column)
    settings |= {"column": column, "target_column": target_column, "label_column": label_column}

    if kind == "causal":
        loaded = _causal(source, column, tokenizer, count, length, size, seed)
    else:
        rows = _choose(source, column, tokenizer, count, seed)
        texts = [_text(row, column, target_column, tokenizer) for row in rows]
        pad_id = pad_token(tokenizer, model_config)
        if kind == "encoder-decoder":
            batches = seq2seq_batches(
                texts,
                tokenizer,
                max_length=length,
                batch_size=size,
                pad_id=pad_id,
                shift=shift_of(model, model_config),
            )
        else:
            labels = _labels(rows, label_column, model_config) if label_column is not None else None
            batches = encoder_batches(
                texts, tokenizer, max_length=length, batch_size=size, pad_id=pad_id, labels=labels
            )
        loaded = CalibrationData(list(batches), {"sha256": _sha256(texts)})
    loaded.description = _describe(loaded, source.description, settings)
    return loaded


def _describe(loaded: CalibrationData, *parts: dict[str, Any]) -> dict[str, Any]:
    description: dict[str, Any] = {}
    for part in parts:
        description |= part
    description |= {"num_samples": loaded.num_examples, "num_tokens": loaded.num_tokens}
    return description | {"has_labels": loaded.has_labels} | loaded.description


def _ready(
    data: Iterable[Any],
    model: PreTrainedModel | None,
    config: PretrainedConfig | None,
    tokenizer: Any,
    limit: int | None,
) -> CalibrationData:
    if limit is None and not hasattr(data, "__len__"):
        limit = DEFAULT_TEXTS  # a stream may have no end
    two_sided = config is not None and model_kind(config, model) == "encoder-decoder"
    shift = shift_of(model, config) if two_sided else None
    batches = list(ready_batches(data, limit=limit, shift=shift, pad_id=pad_token(tokenizer, config)))
    loaded = CalibrationData(batches, {"sha256": digest_batches(batches)})
    if not loaded.num_examples:
        raise DataError("data: no batch holds a row: pass at least one")
    loaded.description = _describe(loaded, {"source": "model-ready batches"})
    return loaded


def _self(
    model: PreTrainedModel | None,
    kind: ModelKind,
    tokenizer: Any,
    count: int,
    length: int,
    batch_size: int,
    settings: dict[str, Any],
    disable: bool | None,
) -> CalibrationData:
    if kind != "causal":
        raise UsageError(
            f"data 'self': only a causal model can write text, this one is of kind {kind}: pass a file of text, one "
            "example a line"
        )
    if model is None:
        raise UsageError("data 'self': the text is sampled from the model: pass the model")
    seed = settings["seed"]
    windows = sample_windows(model, tokenizer, num_samples=count, length=length, seed=seed, disable=disable)
    batches = list(window_batches(windows, torch.arange(count), batch_size))
    loaded = CalibrationData(batches, {"sha256": digest_batches(batches)})
    loaded.description = _describe(loaded, {"source": "self"}, settings)
    return loaded


def _causal(
    source: RowSource, column: str, tokenizer: Any, count: int, length: int, batch_size: int, seed: int
) -> CalibrationData:
    texts: Iterable[TextExample] = (_text(row, column, None, tokenizer) for row in source.rows)
    if not source.sampled:
        # Documents in random order: where reading stops early, all parts of the data have had their chance.
        documents = list(texts)
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
        texts = [documents[place] for place in order]
    # A running text keeps its order, so a larger pool of it is read to choose from.
    pool = 1 if source.sampled and not source.running else POOL
    enough = pool * count * length
    stream, sha256, whole = token_stream(texts, tokenizer, enough=enough, joined=source.running)
    windows, places, warnings = choose_windows(stream, length=length, num_samples=count, seed=seed, source=source.name)
    note = {"sha256": sha256, "pool_tokens": stream.numel(), "read_whole": whole, "warnings": warnings}
    return CalibrationData(list(window_batches(windows, places, batch_size)), note)


def _choose(source: RowSource, column: str, tokenizer: Any, count: int, seed: int) -> list[DataRow]:
    """Choose rows with text evenly without replacement; data in random order are read as far as needed."""
    chosen: list[DataRow] = []
    for row in source.rows:
        if source.sampled and len(chosen) == count:
            break
        if text_of(row, column, tokenizer)[0].strip():
            chosen.append(row)
    if not chosen:
        raise DataError(f"{source.name}: column {column!r} holds no text: pass data that hold text")
    if len(chosen) > count:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen = [chosen[place] for place in order[:count].sort().values.tolist()]
    elif len(chosen) < count:
        logger.info("%s: %d texts, %d were asked for", source.name, len(chosen), count)
    return chosen


def _text(row: DataRow, column: str, target_column: str | None, tokenizer: Any) -> TextExample:
    text, chat = text_of(row, column, tokenizer)
    pair = text_of(row, target_column, tokenizer)[0] if target_column is not None else None
    return TextExample(text, row.where, row.index, chat, pair)


def _labels(rows: list[DataRow], column: str, config: PretrainedConfig) -> list[int | float]:
    regression = config.num_labels == 1 or config.problem_type == "regression"
    labels = labels_of(rows, column, label2id=_label2id(config), regression=regression)
    classes = config.num_labels or 0
    for row, label in zip(rows, labels, strict=True):
        if not regression and label >= classes:
            raise DataError(
                f"{row.where}: label {label} in column {column!r}, but the model has {classes} classes "
                "(0 first): correct the row, or load a model with as many"
            )
    return labels


def _label2id(config: PretrainedConfig) -> dict[str, int]:
    return {str(name): int(number) for name, number in (config.label2id or {}).items()}


def _sha256(texts: Iterable[TextExample]) -> str:
    total = hashlib.sha256()
    for part in _parts(texts):
        total.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return total.hexdigest()


def _parts(texts: Iterable[TextExample]) -> Iterator[str]:
    for text in texts:
        yield text.text
        if text.pair is not None:
            yield text.pair
