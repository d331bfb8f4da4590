"""What is timed: a forward pass, or the two phases of generating text; each as a call that can be repeated.

A causal model reads a prompt (prefill: the logits of its last token, the key-value cache of all), then makes one token
after another (decode). Both are a forward pass of the model's own; they are bound by other things: prefill by products,
decode by reading all weights for each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.data import model_kind
from eckart.data.inference import device_of
from eckart.data.last_token import padding_named, tell_padding
from eckart.data.model_kind import max_positions, pad_token
from eckart.errors import UsageError
from eckart.speed.clock import Run

FORWARD, PREFILL, DECODE = "forward", "prefill", "decode"
MADE_UP = ("input_ids", "pixel_values")
"""Main inputs for which random ones can be made up."""


def phases_of(model: PreTrainedModel, decode: bool = True) -> tuple[str, ...]:
    """The phases of a model: of a causal one that has a cache, prefill and, where it is asked for, decode."""
    if not _generates(model):
        return (FORWARD,)
    return (PREFILL, DECODE) if decode else (PREFILL,)


def tokens_of(phase: str, batch: int, length: int) -> int:
    """Tokens that one call of a phase computes."""
    return batch if phase == DECODE else batch * length


def prepare(model: PreTrainedModel, phase: str, batch: int, length: int, call: Callable[..., Any] | None = None) -> Run:
    """A call of one phase on random input, in evaluation mode.

    Args:
        model: on the device that computes.
        phase: "forward", "prefill" or "decode"; one call of decode is one more token for each text of the batch after
            a prompt of `length` tokens, and the cache is shortened again.
        batch: texts at a time.
        length: tokens of each.
        call: what is called in the model's place, such as a compiled one.

    Raises:
        UsageError: the model has fewer positions, or its cache cannot be shortened.
    """
    needed = length + (phase == DECODE)
    limit = max_positions(model.config, model)
    if limit is not None and needed > limit:
        raise UsageError(f"lengths: {length} for {phase}, but the model has {limit} positions; give smaller lengths.")
    inputs, call = random_inputs(model, batch, length), model if call is None else call
    if phase == FORWARD:
        plain = {"use_cache": False} if "use_cache" in _parameters(model) else {}
        inputs, padding = tell_padding(model, inputs)

        def forward() -> Any:
            with padding_named(model, padding):
                return call(**inputs, **plain)

        return forward
    if phase == PREFILL:
        last = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}
        return lambda: call(**inputs, use_cache=True, **last)
    return _decode(model, inputs, length, call)


def random_inputs(model: PreTrainedModel, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens without padding; of a model that reads images, random pixels.

    Raises:
        UsageError: the model reads something else.
    """
    device = device_of(model)
    stream = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        side = model.config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        pixels = torch.randn(batch, model.config.num_channels, height, width, generator=stream)
        return {"pixel_values": pixels.to(device, model.dtype)}
    if model.main_input_name not in MADE_UP:
        raise UsageError(
            f"{type(model).__name__} reads {model.main_input_name}, which are not made up here; time it with "
            "eckart.speed.latency.compare_latency on inputs of your own."
        )
    text = model.config.get_text_config()
    size, pad = int(getattr(text, "vocab_size", 2)), pad_token(None, model.config)
    ids = torch.randint(0, size, (batch, length), generator=stream)
    ids = ids.masked_fill(ids == pad, (pad + 1) % size).to(device)
    if model_kind(model.config, model) == "encoder-decoder":
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def _decode(model: PreTrainedModel, inputs: dict[str, Tensor], length: int, call: Callable[..., Any]) -> Run:
    token = inputs["input_ids"][:, :1]
    with torch.no_grad():
        cache: Any = getattr(model(**inputs, use_cache=True), "past_key_values", None)
        try:
            model(input_ids=token, past_key_values=cache, use_cache=True)
            _shorten(cache)
            left = cache.get_seq_length()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            left = str(error)
    if left != length:
        raise UsageError(f"decode: the cache of {type(model).__name__} cannot be shortened ({left}); pass --no-decode.")

    def run() -> None:
        call(input_ids=token, past_key_values=cache, use_cache=True)
        _shorten(cache)

    return run


def _shorten(cache: Any) -> None:
    cache.crop(-1)


def _generates(model: PreTrainedModel) -> bool:
    kind = model_kind(model.config, model)
    return kind == "causal" and {"past_key_values", "use_cache"} <= _parameters(model)


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
