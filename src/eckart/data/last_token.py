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


def tell_padding(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
    """Inputs whose padding a model can tell.

    Args:
        model: any; only classifiers that read the last token are told.
        inputs: its keyword arguments.

    Returns:
        The inputs, with other ids where nothing is to be read; and the id that the configuration has to name, see
        :func:`padding_named`, or None if it names one or needs none.
    """
    config: Any = getattr(model, "config", None)
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if config is None or ids is None or ids.dim() != 2 or not reads_last_token(model):
        return inputs, None
    if mask is None or mask.shape != ids.shape:
        mask = torch.ones_like(ids)
    known = config.get_text_config().pad_token_id
    if known is None:
        places = torch.arange(ids.shape[1], device=ids.device)
        last = ids.gather(1, (places * mask.bool()).argmax(1, keepdim=True))
        ends = set(last.flatten().tolist())
        known = unused = next(token for token in range(len(ends) + 1) if token not in ends)
    else:
        unused = None
    return inputs | {"input_ids": ids.masked_fill(~mask.bool(), known)}, unused


@contextmanager
def padding_named(model: nn.Module, token: int | None) -> Iterator[None]:
    """A configuration that names this id of padding while the body runs; as it is for None."""
    config: Any = getattr(model, "config", None)
    holders = [] if token is None else [config.get_text_config(), config]
    holders = [holder for holder in holders if getattr(holder, "pad_token_id", None) is None]
    for holder in holders:
        holder.pad_token_id = token
    try:
        yield
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
