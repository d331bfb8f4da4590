"""Padded batches of separate texts, and of source and target pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from eckart.data.batch import Batch
from eckart.data.examples import TextExample
from eckart.data.labels import Label
from eckart.errors import DataError, UsageError

IGNORED = -100
"""The label that PyTorch's cross-entropy ignores."""

Shift = Callable[[Tensor], Tensor]
"""Labels (B, T) -> decoder inputs (B, T)."""


def encode(texts: Sequence[TextExample], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """Tokenize texts (or pairs) one by one, cut to a length.

    Args:
        texts: The texts.
        tokenizer: The tokenizer.
        max_length: Tokens a text, special tokens included.

    Returns:
        For each text the tokenizer's lists: input_ids, attention_mask and other inputs of the model.
    """
    encoded: list[dict[str, list[int]]] = []
    for start in range(0, len(texts), 256):
        group = texts[start : start + 256]
        pairs = [text.pair for text in group] if group[0].pair is not None else None  # a column: all rows or none
        out = tokenizer(
            [text.text for text in group],
            pairs,
            truncation=True,
            max_length=max_length,
            padding=False,
            add_special_tokens=not group[0].chat,
        )
        encoded += [{name: list(out[name][row]) for name in out} for row in range(len(group))]
    return encoded


def pad(rows: Sequence[Sequence[int]], fill: int, length: int | None = None) -> Tensor:
    """Pad rows on the right.

    Args:
        rows: Lists of ids.
        fill: The value to pad with.
        length: The length to pad to; None for the longest row.

    Returns:
        The ids (B, T).
    """
    length = length if length is not None else max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=torch.long)


def collate(encoded: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Pad tokenized texts to the longest of them.

    Args:
        encoded: As :func:`encode` returned them.
        pad_id: Pads the ids of both sides; all other inputs are padded with 0.

    Returns:
        Model-ready inputs (B, T).
    """
    ids = ("input_ids", "decoder_input_ids")
    return {name: pad([row[name] for row in encoded], pad_id if name in ids else 0) for name in encoded[0]}


def encoder_batches(
    texts: Sequence[TextExample],
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    pad_id: int,
    labels: Sequence[Label] | None = None,
) -> Iterator[Batch]:
    """Put separate texts into batches of about equal lengths.

    Args:
        texts: The texts; pairs go in together.
        tokenizer: The tokenizer.
        max_length: Tokens a text.
        batch_size: Texts a batch.
        pad_id: The padding token.
        labels: The label of each text, if the task has labels.

    Yields:
        Batches padded on the right; `examples` keeps the texts' places in the data.
    """
    encoded = encode(texts, tokenizer, max_length)
    for chosen in by_length([len(row["input_ids"]) for row in encoded], batch_size):
        inputs = collate([encoded[i] for i in chosen], pad_id)
        if labels is not None:
            inputs["labels"] = torch.tensor([labels[i] for i in chosen])
        yield Batch(inputs, tuple(texts[i].index for i in chosen))


def seq2seq_batches(
    texts: Sequence[TextExample],
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    pad_id: int,
    shift: Shift,
) -> Iterator[Batch]:
    """Put sources and targets into batches.

    The pair of a text is its target, and gives the labels. A text without a pair is cut at the space nearest its
    middle: the first half is the source, the second the decoder's input, without labels.

    Args:
        texts: The sources, with targets as their pairs.
        tokenizer: The tokenizer.
        max_length: Tokens on either side.
        batch_size: Texts a batch.
        pad_id: The padding token.
        shift: Makes decoder inputs from labels.

    Yields:
        Batches whose two sides have different lengths, so that a layer knows its side.

    Raises:
        DataError: a target is empty.
    """
    own_targets = texts[0].pair is not None
    halves = [(text.text, text.pair) if text.pair is not None else _halves(text.text) for text in texts]
    sources = tokenizer([first for first, _ in halves], truncation=True, max_length=max_length, padding=False)
    # One token less than the source may have: room for the column that makes the lengths differ.
    targets = tokenizer(
        text_target=[second for _, second in halves],
        truncation=True,
        max_length=max_length - 1,
        padding=False,
    )["input_ids"]
    empty = [text.where for text, ids in zip(texts, targets, strict=True) if not ids]
    if empty and (own_targets or len(empty) == len(texts)):
        what = "the target holds no token" if own_targets else "the text is too short to be cut into source and target"
        raise DataError(f"{empty[0]}: {what} ({len(empty)} such rows). Fill it in, or remove the row.")
    encoded = [{name: list(sources[name][row]) for name in sources} for row in range(len(texts))]
    for chosen in by_length([len(row["input_ids"]) for row in encoded], batch_size):
        inputs = collate([encoded[i] for i in chosen], pad_id)
        labels = pad([targets[i] for i in chosen], IGNORED)
        inputs |= decoder_inputs(labels, shift, pad_id, source_length=inputs["input_ids"].shape[1])
        if not own_targets:
            del inputs["labels"]
        yield Batch(inputs, tuple(texts[i].index for i in chosen))


def decoder_inputs(labels: Tensor, shift: Shift, pad_id: int, source_length: int) -> dict[str, Tensor]:
    """Make the decoder's side of a batch from its labels.

    Args:
        labels: Target ids (B, T), -100 for none.
        shift: Makes decoder inputs from labels.
        pad_id: The padding token.
        source_length: Length of the encoder's side; if T equals it, one masked column is added.

    Returns:
        decoder_input_ids, decoder_attention_mask and labels, (B, T) or (B, T + 1).
    """
    if labels.shape[1] == source_length:
        labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)
    ids = shift(labels)
    # Position i reads the token before label i and predicts label i: it is real where label i is.
    real = labels != IGNORED
    return {
        "decoder_input_ids": ids.masked_fill(~real | (ids < 0), pad_id),
        "decoder_attention_mask": real.long(),
        "labels": labels,
    }


def shift_of(model: Any, config: Any) -> Shift:
    """Return the function that makes a model's decoder inputs from labels.

    Args:
        model: The model, or None.
        config: Its configuration.

    Returns:
        The model's `prepare_decoder_input_ids_from_labels` if it has one; else a shift to the right that starts with
        `decoder_start_token_id`.

    Raises:
        UsageError: If the model has neither.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise UsageError(
            "config.decoder_start_token_id is not set, so targets cannot be shifted right: set it in the model's config"
        )

    def shift(labels: Tensor) -> Tensor:
        ids = labels.new_full(labels.shape, start)
        ids[:, 1:] = labels[:, :-1]
        return ids

    return shift


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group rows of about equal lengths.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows a group.

    Returns:
        Row numbers, longest rows first: a batch that does not fit in memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _halves(text: str) -> tuple[str, str]:
    """Cut a text at the space nearest its middle; a single word is its own target."""
    middle = len(text) // 2
    spaces = [place for place in (text.rfind(" ", 0, middle), text.find(" ", middle)) if place > 0]
    if not spaces:
        return text, text
    cut = min(spaces, key=lambda place: abs(place - middle))
    first, second = text[:cut].strip(), text[cut:].strip()
    return (first, second) if first and second else (text, text)
