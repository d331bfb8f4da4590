"""Windows of running text for causal models."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from eckart.data.batch import Batch
from eckart.data.draw import Wanted
from eckart.data.examples import TextExample
from eckart.errors import DataError

POOL = 16
"""Reading stops at this many times the number of windows that are needed: a large file is not read whole."""

CHARACTERS_PER_TOKEN = 12
"""No text has more characters for each token: a bound on what is tokenized at once."""

logger = logging.getLogger(__name__)


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its BOS token before a text by default."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer("a")["input_ids"][:1] == [bos] and plain[:1] != [bos]


def token_stream(
    texts: Iterable[TextExample], tokenizer: Any, *, enough: int, joined: bool
) -> tuple[Tensor, str, bool]:
    """Tokenize documents into one stream.

    A document starts with BOS if the tokenizer adds it by default, and is separated from the next by EOS if there is
    one. Documents that a chat template wrote have special tokens already and get no second BOS.

    Args:
        texts: The documents.
        tokenizer: The tokenizer.
        enough: Tokens after which reading stops.
        joined: The texts are pieces of one document: neither BOS nor EOS between them.

    Returns:
        The token ids (N,), the SHA-256 of the text that was read, and whether all of it was read.
    """
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    eos = getattr(tokenizer, "eos_token_id", None)
    between = [eos] if eos is not None and not joined else []
    digest = hashlib.sha256()
    ids: list[int] = []
    whole = True
    source = iter(texts)
    while len(ids) < enough and (group := list(islice(source, 64))):
        cut = [text.text[: (enough - len(ids)) * CHARACTERS_PER_TOKEN] for text in group]
        whole = whole and all(len(short) == len(text.text) for short, text in zip(cut, group, strict=True))
        encoded = tokenizer(cut, add_special_tokens=False, verbose=False)["input_ids"]
        for text, short, tokens in zip(group, cut, encoded, strict=True):
            digest.update(short.encode("utf-8", "surrogatepass") + b"\0")
            if not tokens:
                continue
            start = [] if (joined and ids) or (text.chat and tokens[:1] == bos) else bos
            ids += (between if ids else []) + start + tokens
    whole = whole and len(ids) <= enough and next(source, None) is None
    return torch.tensor(ids[:enough], dtype=torch.long), digest.hexdigest(), whole


def choose_windows(
    stream: Tensor, *, length: int, num_samples: int, wanted: Wanted, seed: int, source: str
) -> tuple[Tensor, Tensor, list[str]]:
    """Cut a stream into windows of one length and choose among them.

    Args:
        stream: Token ids (N,).
        length: Tokens a window; the tail is dropped.
        num_samples: Windows to draw, uniformly without replacement.
        wanted: What is asked for of these.
        seed: For the draw.
        source: Name of the data, for messages.

    Returns:
        The windows (S, length), their places in the stream (S,), in their order or, where all are taken, in
        random order, and warnings. A text too short for one window
        gives one shorter window.

    Raises:
        DataError: If there is no token.
    """
    if stream.numel() == 0:
        raise DataError(f"{source}: no text to calibrate on: pass data that hold text")
    warnings = []
    if stream.numel() < length:
        warnings.append(f"{source}: {stream.numel()} tokens do not fill one window of {length}: one shorter window")
        length = stream.numel()
    windows = stream[: stream.numel() // length * length].view(-1, length)  # (W, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    if len(windows) > num_samples:
        places = order[:num_samples].sort().values
    else:  # so that a part of the batches is from the whole text, and another one for each seed
        places = order
        warnings = warnings or wanted.describe_lack(source, len(windows), f"windows of {length} tokens")
    for warning in warnings:
        logger.warning(warning)
    return windows[places], places, warnings


def window_batches(windows: Tensor, places: Tensor, batch_size: int) -> Iterator[Batch]:
    """Put windows into batches.

    Args:
        windows: Token ids (S, T).
        places: Their places in the data (S,).
        batch_size: Windows a batch.

    Yields:
        Batches without padding.
    """
    for rows, at in zip(windows.split(batch_size), places.split(batch_size), strict=True):
        yield Batch({"input_ids": rows.clone(), "attention_mask": torch.ones_like(rows)}, tuple(at.tolist()))
