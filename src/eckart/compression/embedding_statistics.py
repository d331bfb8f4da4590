"""What a model's token embeddings are asked for: how often each token is looked up, and what tied heads multiply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.calibration.forward_context import forward_context
from eckart.calibration.layerwise import all_blocks
from eckart.data import Batch, CalibrationData, model_kind
from eckart.data.batch import SIDES
from eckart.data.inference import forward, progress
from eckart.model import EmbeddingTable, WeightLoader
from eckart.moments import gather


def count_tokens(model: PreTrainedModel, table: EmbeddingTable, data: CalibrationData | None) -> Tensor | None:
    """(v,) how often each token of the data is looked up in a table; None without token ids."""
    if data is None:
        return None
    rows = table.shape[0]
    counts = torch.zeros(rows, dtype=torch.float64)
    sides = _sides(model, table)
    for batch in data.batches:
        masks = batch.masks()
        for ids, _ in sides:
            given = batch.inputs.get(ids)
            if given is None or given.is_floating_point():
                continue
            flat = given.reshape(-1, given.shape[-1])
            mask = masks.get(flat.shape[-1])
            real = flat if mask is None or mask.shape != flat.shape else flat[mask]
            real = real[(real >= 0) & (real < rows)].flatten()
            counts += torch.bincount(real, minlength=rows).double()
    return counts


def _sides(model: PreTrainedModel, table: EmbeddingTable) -> Sequence[tuple[str, str]]:
    """Whose tokens a table is asked for: both sides' of an encoder-decoder, unless it belongs to one of them."""
    if not model.config.is_encoder_decoder:
        return SIDES[:1]
    inside = [_in_decoder(model, name) for name in table.embeddings]
    if None in inside or len(set(inside)) > 1:
        return SIDES
    return SIDES[1:] if inside[0] else SIDES[:1]


def _in_decoder(model: PreTrainedModel, name: str) -> bool | None:
    """Whether a module is in the decoder, not in the encoder; None if it is in neither, or in both."""
    module = model.get_submodule(name)
    encoder, decoder = (
        any(module is part for part in half.modules()) if half is not None and half is not model else False
        for half in (model.get_encoder(), model.get_decoder())
    )
    return None if encoder == decoder else decoder


def is_causal(model: PreTrainedModel, name: str) -> bool:
    """Whether an embedding must not look at later tokens; where it is not known, it must not."""
    if model.config.is_encoder_decoder:
        return _in_decoder(model, name) is not False
    return model_kind(model.config, model) == "causal"


def head_inputs(
    model: PreTrainedModel,
    tables: Sequence[EmbeddingTable],
    data: CalibrationData | None,
    weights: WeightLoader,
    notes: list[str],
) -> dict[str, Tensor]:
    """Table -> `E[h h^T]` of what its heads multiply, gathered in one pass over the data."""
    heads = {head: (head,) for table in tables for head in table.output_heads}
    if not heads or data is None:
        return {}

    def step(batch: Batch) -> None:
        forward(model, batch.inputs)

    with forward_context(model, weights, all_blocks(model))(None):
        batches = progress(data.batches, what="inputs of tied heads", total=len(data))
        found = gather(model, heads, batches, step, needs=frozenset({"gram"}))
    grams: dict[str, Tensor] = {}
    for table in tables:
        seen = [found[head] for head in table.output_heads if found[head].tokens]
        if seen:
            total = sum(inputs.tokens for inputs in seen)
            grams[table.name] = sum(inputs["gram"].mean * (inputs.tokens / total) for inputs in seen)
        elif table.output_heads:
            notes.append(
                f"{table.output_heads[0]}: no token of the data was seen there, so only look-ups weigh {table.name}"
            )
    return grams
