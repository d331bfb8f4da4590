"""Perplexity of a causal model on running text, by a stated protocol."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from eckart.config import DEFAULT_BATCH_SIZE
from eckart.data.columns import replace_surrogates
from eckart.data.explain import require_known_tokens
from eckart.data.inference import evaluating, progress, run
from eckart.data.model_kind import UNLIMITED, max_positions
from eckart.data.windows import adds_bos
from eckart.errors import DataError, UsageError
from eckart.evaluation.divergence import negative_log_likelihood
from eckart.moments import run_in_halves

WINDOW = 1024
"""Tokens a window, where no number is asked for and the model has as many positions."""


@dataclass(frozen=True)
class _Window:
    """Tokens `start` up to `end` of the text are read, those from `scored` on are scored."""

    start: int
    scored: int
    end: int


def measure_perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_tokens: int | None = None,
    disable: bool | None = None,
) -> dict[str, Any]:
    """Measure how well a causal model predicts a text.

    Protocol: the text is tokenized without special tokens; several documents are joined by EOS. It is cut into
    windows of `window` tokens one after the other, the tail included. If the tokenizer adds BOS by default, every
    window starts with it (as one of its `window` tokens) and all other tokens are scored; if not, a window's first
    token is context and is not scored. With a `stride` smaller than a window, windows overlap, and each scores only
    what none before it has scored. Log-probabilities are taken in float32 and summed in float64.

    Args:
        model: A causal model with its language modeling head, on any device, in any dtype.
        tokenizer: Its tokenizer.
        text: One text, or documents.
        window: Tokens a window; None for 1,024 or as many as the model has positions for.
        stride: Tokens from one window to the next; None for windows that do not overlap.
        batch_size: Windows at once. Windows of one batch have equal lengths, so there is no padding.
        max_tokens: Only the first so many tokens of the text are used; None for all.
        disable: True for no progress bar; None for none where the output is not a terminal.

    Returns:
        `perplexity`; `nll_per_token` in nats; `bits_per_byte` (UTF-8 bytes of the scored text, to within one
        character a window); `tokens` and `bytes` scored; `finite`, and `nonfinite_tokens`: values that are not
        finite are kept as they are, never skipped; `protocol` in words.

    Raises:
        UsageError: If window or stride make no sense, or the model returns no logits.
        DataError: If the text has no token to score.
    """
    bos = adds_bos(tokenizer)
    window, stride = _settle(model, tokenizer, window, stride, bos, batch_size, max_tokens)
    documents = [replace_surrogates(each) for each in ([text] if isinstance(text, str) else text)]
    ids, byte_ends = _tokenize(documents, tokenizer, max_tokens)
    windows = _windows(len(ids), window - bos, stride, context=0 if bos else 1)
    scored = sum(part.end - part.scored for part in windows)
    if scored == 0:
        raise DataError(f"text: {len(ids)} tokens leave none to score: pass a longer text")

    tokens = torch.tensor(ids, dtype=torch.long)
    require_known_tokens([{"input_ids": tokens}], model, getattr(model, "config", None), tokenizer)
    first = torch.tensor([tokenizer.bos_token_id] if bos else [], dtype=torch.long)

    def score(group: _Group) -> tuple[float, int]:
        rows = torch.stack([torch.cat([first, tokens[part.start : part.end]]) for part in group.examples])  # (B, T)
        output = run(model, {"input_ids": rows, "attention_mask": torch.ones_like(rows)})
        logits = getattr(output, "logits", None)
        if logits is None or logits.shape[:2] != rows.shape:
            raise UsageError(f"{type(model).__name__} returns no logits a token: load it with AutoModelForCausalLM")
        cost, nonfinite = 0.0, 0
        for row, part in enumerate(group.examples):
            # The logits at position i are about token i + 1.
            at = part.scored - part.start + len(first)
            costs = negative_log_likelihood(logits[row, at - 1 : -1], rows[row, at:].to(logits.device))
            nonfinite += int((~torch.isfinite(costs)).sum())
            cost += float(costs.sum())
        return cost, nonfinite

    groups = [_Group(tuple(group)) for group in _groups(windows, batch_size)]
    with evaluating(model):
        found = list(run_in_halves(progress(groups, what="perplexity", disable=disable), score))
    total, nonfinite = sum(cost for cost, _ in found), sum(count for _, count in found)
    size = sum(byte_ends[part.end - 1] - (byte_ends[part.scored - 1] if part.scored else 0) for part in windows)
    mean = total / scored
    overlap = "non-overlapping" if stride == window - bos else f"stride {stride},"
    return {
        "perplexity": _exp(mean),
        "nll_per_token": mean,
        "bits_per_byte": total / math.log(2) / size if size else math.nan,
        "tokens": scored,
        "bytes": size,
        "finite": nonfinite == 0,
        "nonfinite_tokens": nonfinite,
        "protocol": (
            f"{overlap} windows of {window} tokens, "
            + ("each started by BOS, all text tokens scored" if bos else "a window's first token is context")
            + (", documents joined by EOS" if len(documents) > 1 else "")
            + (f", first {max_tokens} tokens" if max_tokens is not None else "")
        ),
    }


@dataclass(frozen=True)
class _Group:
    """Windows of one length, which run at once."""

    examples: tuple[_Window, ...]

    def rows(self, start: int, stop: int) -> _Group:
        return _Group(self.examples[start:stop])


def _settle(
    model: nn.Module,
    tokenizer: Any,
    window: int | None,
    stride: int | None,
    bos: bool,
    batch_size: int,
    max_tokens: int | None,
) -> tuple[int, int]:
    config: Any = getattr(model, "config", None)
    limit = max_positions(config, model) if config is not None else None
    if window is None:
        named = getattr(tokenizer, "model_max_length", None) or UNLIMITED
        window = min(WINDOW, limit or WINDOW, named if named < UNLIMITED else WINDOW)
    for name, value, least in (("window", window, 2), ("batch_size", batch_size, 1), ("max_tokens", max_tokens, 1)):
        if value is not None and value < least:
            raise UsageError(f"{name}: {value} is too few: pass at least {least}")
    if limit is not None and window > limit:
        raise UsageError(f"window: {window} is more than the model's {limit} positions: pass at most {limit}")
    stride = window - bos if stride is None else stride
    if not 1 <= stride <= window - bos:
        raise UsageError(f"stride: {stride} leaves out text or stands still: pass 1 to {window - bos}")
    return window, stride


def _tokenize(documents: list[str], tokenizer: Any, max_tokens: int | None) -> tuple[list[int], list[int]]:
    """Return the tokens of all documents, joined by EOS, and at which UTF-8 byte of the text each of them ends."""
    eos = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    ends: list[int] = []
    size = 0
    for document in documents:
        if max_tokens is not None and len(ids) >= max_tokens:
            break
        if ids and eos is not None:
            ids.append(eos)
            ends.append(size)
        found, lengths = _byte_lengths(document, tokenizer)
        ids += found
        ends += [size + length for length in lengths]
        size = ends[-1] if ends else 0
    return ids[:max_tokens], ends[:max_tokens]


def _byte_lengths(document: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokenize one document; return its tokens and how many bytes of it lie before the end of each."""
    size = len(document.encode("utf-8", "surrogatepass"))
    if not getattr(tokenizer, "is_fast", False):
        ids = list(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        # Without offsets, every token of a document counts the same.
        return ids, [round(size * (place + 1) / len(ids)) for place in range(len(ids))]
    encoded = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends, place, before = [], 0, 0
    for _, end in encoded["offset_mapping"]:
        if end > place:
            before += len(document[place:end].encode("utf-8", "surrogatepass"))
            place = end
        ends.append(before)
    if ends:
        ends[-1] = size  # what the tokenizer drops at the end was read all the same
    return list(encoded["input_ids"]), ends


def _windows(length: int, size: int, stride: int, context: int) -> list[_Window]:
    """Lay windows over `length` tokens; each scores what none before it has."""
    windows: list[_Window] = []
    done = 0
    for start in range(0, length, stride):
        end = min(start + size, length)
        scored = max(start + context, done)
        if scored < end:
            windows.append(_Window(start, scored, end))
        done = end
        if end == length:
            break
    return windows


def _groups(windows: list[_Window], batch_size: int) -> list[list[_Window]]:
    """Put windows of equal lengths together; only the last can be shorter."""
    if not windows:
        return []
    whole = bisect_left(windows, True, key=lambda part: part.end - part.start < windows[0].end - windows[0].start)
    groups = [windows[start : min(start + batch_size, whole)] for start in range(0, whole, batch_size)]
    return groups + [[part] for part in windows[whole:]]


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
