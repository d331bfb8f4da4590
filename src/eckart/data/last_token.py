"""Classifiers that read the last token of a text: which token that is, they tell by the id of padding alone.

Where a configuration names no such id, transformers' classes take one text at a time; where it names another id than
the padding of a batch has, they read the padding. For a pass, padding gets an id that tells: the configured one, or
where there is none, one that ends no text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eckart.data.model_kind import reads_on


@contextmanager
def told_padding(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Inputs whose padding the model knows, and a configuration that names its id, for as long as the body runs.

    Args:
        model: any; only classifiers that read the last token are told.
        inputs: its keyword arguments.

    Yields:
        The inputs, with other ids where nothing is to be read.
    """
    config: Any = getattr(model, "config", None)
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if config is None or ids is None or ids.dim() != 2 or not reads_last_token(model):
        yield inputs
        return
    text = config.get_text_config()
    known = text.pad_token_id
    padded = mask is not None and mask.shape == ids.shape and not bool(mask.all())
    if known is not None or len(ids) == 1:
        if known is None or not padded or mask is None:
            yield _without_padding(inputs) if known is None and padded else inputs
        else:
            yield inputs | {"input_ids": ids.masked_fill(~mask.bool(), known)}
        return
    real = mask.bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    places = torch.arange(ids.shape[1], device=ids.device)
    last = ids.gather(1, (places * real).argmax(1, keepdim=True))
    ends = set(last.flatten().tolist())
    unused = next(token for token in range(len(ends) + 1) if token not in ends)
    holders = [holder for holder in (text, config) if getattr(holder, "pad_token_id", None) is None]
    for holder in holders:
        holder.pad_token_id = unused
    try:
        yield inputs | {"input_ids": ids.masked_fill(~real, unused)}
    finally:
        for holder in holders:
            holder.pad_token_id = None


def reads_last_token(model: nn.Module) -> bool:
    """Whether a model is a classifier on a body that reads from left to right."""
    config: Any = model.config
    return (
        any(
            kind.__name__.endswith("ForSequenceClassification") for kind in type(model).__mro__
        )  # of any age and origin
        and not getattr(config, "is_encoder_decoder", False)
        and reads_on(config)
    )


def _without_padding(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One text without its padding: a classifier that knows of none reads the last place."""
    real = inputs["attention_mask"][0].bool()
    length = len(real)
    return {
        name: value[:, real.to(value.device)] if value.dim() == 2 and value.shape[1] == length else value
        for name, value in inputs.items()
    }
