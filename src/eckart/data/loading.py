"""Calibration data, from text of any origin or from batches."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from eckart.config import DEFAULT_BATCH_SIZE, DEFAULT_TEXTS, DEFAULT_TOKENS, default_samples
from eckart.data.batch import CalibrationData
from eckart.data.columns import find_pair_column, find_text_column, has_column, peek_rows, require_column
from eckart.data.digest import digest_batches
from eckart.data.draw import Wanted, choose_rows, draw_rows
from eckart.data.examples import TextExample, example_of
from eckart.data.explain import require_known_tokens
from eckart.data.items import first_item
from eckart.data.labels import class_labels
from eckart.data.model_kind import (
    CLASSIFIERS,
    ModelKind,
    has_head,
    max_positions,
    model_kind,
    pad_token,
    sequence_length,
)
from eckart.data.model_ready import is_model_ready, model_ready_batches
from eckart.data.names import TEXT_NAMES, normalize_name
from eckart.data.padding import encoder_batches, seq2seq_batches, shift_of
from eckart.data.pooling import Pooling
from eckart.data.ready_examples import example_batches, is_ready_example
from eckart.data.rows import DataRow
from eckart.data.source import RowSource, open_source
from eckart.data.windows import POOL, choose_windows, token_stream, window_batches
from eckart.errors import DataError, UsageError

logger = logging.getLogger(__name__)

MODEL_READY = "model-ready batches"
"""The source, as reports name it, of batches that the user made."""


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
    extra_samples: int = 0,
    max_seq_length: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    kind: ModelKind | None = None,
    pooling: Pooling | None = None,
    disable: bool | None = None,
) -> CalibrationData:
    """Load calibration data.

    Causal models get windows of packed text, encoders separate texts padded batch by batch, encoder-decoders pairs
    of source and target.

    Args:
        data: A .txt, .jsonl, .csv or .tsv file, a folder of such files, "stdlib" (the source of Python's library),
            "self" (text that a causal model samples), a hub identifier, a `datasets.Dataset`, an iterable of
            strings, rows, chats or rows of token ids, a data frame, or an iterable of model-ready batches. None for
            WikiText-2 from the hub.
        tokenizer: The model's tokenizer; needed for everything but model-ready batches.
        model: The model: needed for "self"; otherwise it decides what its configuration leaves open.
        model_config: The configuration, if the model itself is not loaded.
        config: The hub data set's configuration.
        split: The hub data set's split.
        column: The column that holds text or chat messages.
        target_column: A second column: the other half of a sentence pair for encoders, the target for
            encoder-decoders. A classifier's is found if neither column is named and both have usual names.
        label_column: The label, for models with a classification or regression head.
        revision: The hub data set's revision.
        num_samples: Windows (128 by default) or texts (1,024); of model-ready batches, rows (all by default, or 1,024
            if their number is not known).
        extra_samples: So many on top of `num_samples` or its default, to measure on.
        max_seq_length: Tokens in a window or text: 512 by default, never more than the model has positions for.
        batch_size: Rows in a batch, 8 by default; model-ready batches stay as they are.
        seed: For the choice among more data than are needed, and for sampling "self".
        kind: What the model reads; None decides by its class.
        pooling: Of a model of sentence embeddings: it reads separate texts, with the prompt, the case and the length
            that this says.
        disable: No progress bar.

    Returns:
        Batches on the CPU, and a description of the data.

    Raises:
        UsageError: If the data do not fit the model, or an option does not fit the data.
        DataError: If the data cannot be found or read, or are empty.
    """
    _check_numbers(num_samples=num_samples, max_seq_length=max_seq_length, batch_size=batch_size)
    if isinstance(data, CalibrationData):
        return data
    model_config = model_config if model_config is not None else getattr(model, "config", None)
    first, data = first_item(data)
    if is_model_ready(first) and not is_ready_example(first):
        rows_wanted = None if num_samples is None else num_samples + extra_samples
        return _load_ready(data, model, model_config, tokenizer, rows_wanted)
    if model_config is None:
        raise UsageError("model_config: it decides how text is cut: pass the model or its configuration")

    kind = kind or ("encoder" if pooling is not None else model_kind(model_config, model))
    named = isinstance(data, str | os.PathLike) and data != "self"
    if tokenizer is None and not named and not is_ready_example(first):  # a file may hold token ids
        raise UsageError("tokenizer: text needs one: pass the model's tokenizer, or model-ready batches")
    _check_columns(kind, model_config, model, label_column, target_column)
    limit = (pooling.max_seq_length if pooling is not None else None) or DEFAULT_TOKENS
    default = min(limit, DEFAULT_TOKENS)
    length = sequence_length(max_seq_length, default, tokenizer=tokenizer, config=model_config, model=model)
    count = (num_samples or default_samples(kind)) + extra_samples
    wanted = Wanted(count - extra_samples, num_samples is not None)
    amount = _Amount(count, wanted, length, batch_size or DEFAULT_BATCH_SIZE, seed)
    settings: dict[str, Any] = {"kind": kind, "max_seq_length": length, "seed": seed}
    if isinstance(data, str) and data == "self":
        return _describe(_load_sampled(model, kind, tokenizer, amount, disable), {"source": "self"}, settings)

    source = open_source(
        data,
        config=config,
        split=split,
        revision=revision,
        asked=tuple(name for name in (column, target_column, label_column) if name is not None),
        whole_text=kind == "causal",
        seed=seed,
    )
    first_rows, source.rows = peek_rows(source.rows, source.name)
    if _holds_examples(first_rows, column or source.column):
        loaded = _load_examples(source, model, model_config, tokenizer, amount, label_column, max_seq_length)
        return _describe(loaded, source.description, settings)
    if tokenizer is None:
        raise UsageError("tokenizer: text needs one: pass the model's tokenizer, or model-ready batches")
    asked = column or source.column
    column = find_text_column(first_rows, source.name, asked=asked, taken=(target_column, label_column))
    if asked is None and target_column is None and has_head(model_config, model, "AutoModelForSequenceClassification"):
        target_column = find_pair_column(first_rows, column, taken=(label_column,))
    for other in (target_column, label_column):
        if other is not None:
            require_column(other, first_rows, source.name)
    settings |= {"column": column, "target_column": target_column, "label_column": label_column}
    if kind == "causal":
        loaded = _load_windows(source, column, tokenizer, amount)
    else:
        rows = choose_rows(source, column, tokenizer, amount.num_samples, seed)
        examples = [example_of(row, column, target_column, tokenizer) for row in rows]
        if pooling is not None:
            examples = [replace(example, text=pooling.text(example.text)) for example in examples]
        pad_id = pad_token(tokenizer, model_config)
        if kind == "encoder-decoder":
            batches = seq2seq_batches(
                examples,
                tokenizer,
                max_length=length,
                batch_size=amount.batch_size,
                pad_id=pad_id,
                shift=shift_of(model, model_config),
            )
        else:
            batches = encoder_batches(
                examples,
                tokenizer,
                max_length=length,
                batch_size=amount.batch_size,
                pad_id=pad_id,
                labels=None if label_column is None else class_labels(rows, label_column, model_config),
            )
        loaded = CalibrationData(list(batches), {"sha256": _digest_texts(examples)})
        few = amount.wanted.describe_lack(source.name, len(rows), "texts")
        for warning in few:
            logger.warning(warning)
        loaded.description |= {"warnings": few} if few else {}
    require_known_tokens(loaded, model, model_config, tokenizer)
    return _describe(loaded, source.description, settings)


@dataclass(frozen=True)
class _Amount:
    """How much is read, what is wanted of that, and the seed of the choice."""

    num_samples: int
    wanted: Wanted
    length: int
    batch_size: int
    seed: int


def _check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name}: {value!r} is not a whole number above 0: pass one, or None for the default")


def _check_columns(
    kind: ModelKind,
    config: PretrainedConfig,
    model: PreTrainedModel | None,
    label_column: str | None,
    target_column: str | None,
) -> None:
    if label_column is not None and not has_head(config, model, *CLASSIFIERS):
        name = type(model).__name__ if model is not None else config.model_type
        raise UsageError(
            f"--data-label-column {label_column}: {name} has no head that gives a label a text: leave it out, or load "
            "the model with AutoModelForSequenceClassification"
        )
    if target_column is not None and kind == "causal":
        raise UsageError("target_column: a causal model reads one text: put both into one column, or leave it out")


def _load_ready(
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
    batches = list(model_ready_batches(data, limit=limit, shift=shift, pad_id=pad_token(tokenizer, config)))
    require_known_tokens(batches, model, config, tokenizer)
    loaded = CalibrationData(batches, {"sha256": digest_batches(batches)})
    if not loaded.num_examples:
        raise DataError("data: no batch holds a row: pass at least one")
    return _describe(loaded, {"source": MODEL_READY})


def _holds_examples(first: Sequence[DataRow], column: str | None) -> bool:
    """Whether rows hold token ids or features and no text; a text beside them goes before token ids."""
    if column is not None and column != "input_ids":
        return False
    texts = [name for names in TEXT_NAMES for name in names]
    if column is None and any(has_column(name, first) for name in first[0].values if normalize_name(name) in texts):
        return False
    return is_ready_example(first[0].values)


def _load_examples(
    source: RowSource,
    model: PreTrainedModel | None,
    config: PretrainedConfig,
    tokenizer: Any,
    amount: _Amount,
    label_column: str | None,
    max_length: int | None,
) -> CalibrationData:
    rows = draw_rows(source.rows, amount.num_samples, amount.seed, in_order=source.sampled)
    limit = max_positions(config, model)
    length = amount.length if max_length is not None else limit
    batches = example_batches(
        rows,
        model=model,
        batch_size=amount.batch_size,
        max_length=length,
        pad_id=pad_token(tokenizer, config),
        shift=shift_of(model, config) if model_kind(config, model) == "encoder-decoder" else None,
        labels=None if label_column is None else class_labels(rows, label_column, config),
    )
    found = list(batches)
    require_known_tokens(found, model, config, tokenizer)
    return CalibrationData(found, {"sha256": digest_batches(found)})


def _load_sampled(
    model: PreTrainedModel | None, kind: ModelKind, tokenizer: Any, amount: _Amount, disable: bool | None
) -> CalibrationData:
    from eckart.data.self_sampled import sample_windows  # generation is not needed otherwise

    if kind != "causal":
        raise UsageError(
            f"data 'self': only a causal model can write text, this one is of kind {kind}: pass a file of text, one "
            "example a line"
        )
    if model is None:
        raise UsageError("data 'self': the text is sampled from the model: pass the model")
    windows = sample_windows(
        model,
        tokenizer,
        num_samples=amount.num_samples,
        length=amount.length,
        seed=amount.seed,
        disable=disable,
    )
    batches = list(window_batches(windows, torch.arange(amount.num_samples), amount.batch_size))
    return CalibrationData(batches, {"sha256": digest_batches(batches)})


def _load_windows(source: RowSource, column: str, tokenizer: Any, amount: _Amount) -> CalibrationData:
    texts: Iterable[TextExample] = (example_of(row, column, None, tokenizer) for row in source.rows)
    if not source.sampled:
        # Documents in random order: if reading stops early, every part of the data had the same chance.
        documents = list(texts)
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(amount.seed)).tolist()
        texts = [documents[place] for place in order]
    # A running text keeps its order, so more of it is read and windows are chosen from all that was read.
    pool = 1 if source.sampled and not source.running else POOL
    enough = pool * amount.num_samples * amount.length
    stream, sha256, whole = token_stream(texts, tokenizer, enough=enough, joined=source.running)
    windows, places, warnings = choose_windows(
        stream, length=amount.length, num_samples=amount.num_samples, wanted=amount.wanted, seed=amount.seed,
        source=source.name,
    )  # fmt: skip
    note = {"sha256": sha256, "pool_tokens": stream.numel(), "read_whole": whole, "warnings": warnings}
    return CalibrationData(list(window_batches(windows, places, amount.batch_size)), note)


def _describe(loaded: CalibrationData, *parts: dict[str, Any]) -> CalibrationData:
    """Complete the description; what the loaded data say of themselves goes last."""
    description: dict[str, Any] = {}
    for part in parts:
        description |= part
    description |= {"num_samples": loaded.num_examples, "num_tokens": loaded.num_tokens}
    loaded.description = description | {"has_labels": loaded.has_labels} | loaded.description
    return loaded


def _digest_texts(examples: Iterable[TextExample]) -> str:
    """As published reports hold it: texts and pairs, each ended by a zero byte."""
    total = hashlib.sha256()
    for example in examples:
        for text in (example.text, example.pair):
            if text is not None:
                total.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return total.hexdigest()
