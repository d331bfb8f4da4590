"""Whether tokens can leave between the blocks of a model, and where it shows its attention: tried, not looked up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.adaptive import attach, detach
from eckart.adaptive.token_skipping import CHANGE, TokenSkipping, attention_in
from eckart.calibration.layerwise import LayerwiseError, all_blocks, schedule_of
from eckart.data.inference import evaluating, forward
from eckart.data.model_kind import max_positions, model_kind
from eckart.errors import ModelError
from eckart.forms.transformers_internals import attention_of

CLOSE = 1e-4
"""How far outputs may be apart, of the largest."""

LENGTHS = (9, 6, 4)
"""Tokens of the rows that are tried."""

SPARE = 3
"""Places of padding beyond the longest row."""


@dataclass(frozen=True)
class SkippingPlaces:
    """Where tokens can leave a model.

    Attributes:
        blocks: names, in the order of a pass.
        attention: inside each block, the module that returns attention maps; "change" where there is none.
        error: how far the outputs of the trial were apart, of the largest.
    """

    blocks: tuple[str, ...]
    attention: str
    error: float


def find_places(model: PreTrainedModel, stays: tuple[str, ...] = ("first",)) -> SkippingPlaces:
    """Try a model: padding leaves after its first block, and half of the tokens, and no output changes by it.

    Args:
        model: on the CPU, in float32; it is left as it was.
        stays: tokens that always stay.

    Raises:
        ModelError: tokens cannot leave this model; the message says why.
    """
    name = type(model).__name__
    kind = model_kind(model.config, model)
    if kind != "encoder" or not _reads_both_ways(model):
        raise ModelError(
            f"recovery token-skipping: {name} reads its text from left to right, or a second text beside it: tokens "
            "can leave only where every token has seen all others. Give an encoder, such as BERT."
        )
    with evaluating(model):
        inputs = made_up(model)
        try:
            blocks = schedule_of(model, all_blocks(model), lambda: forward(model, inputs)).steps
            if len({block.rpartition(".")[0] for block in blocks}) > 1:
                raise LayerwiseError("its blocks are in several lists")
            attention = find_attention(model, blocks, inputs)
            error = _try(model, blocks, attention, stays, inputs)
        except (LayerwiseError, RuntimeError, ModelError, IndexError, TypeError, ValueError) as failure:
            why = str(failure).strip().splitlines()[0]
            raise ModelError(
                f"recovery token-skipping: tokens cannot leave between the blocks of {name}: {why} The models with one "
                "list of blocks, and with absolute or rotary positions, are those that it is for."
            ) from failure
    if not error <= CLOSE:
        raise ModelError(
            f"recovery token-skipping: {name} gives outputs that are {error:.2g} of the largest apart when tokens "
            "leave that nothing looks at, so it reads them elsewhere. It cannot be made to skip tokens."
        )
    return SkippingPlaces(tuple(blocks), attention, error)


def made_up(model: PreTrainedModel) -> dict[str, Tensor]:
    """Rows of several lengths, padded further than the longest."""
    length = LENGTHS[0] + SPARE
    limit = max_positions(model.config, model)
    if limit is not None and limit < length:
        raise ModelError(f"it has positions for {limit} tokens, and {length} are tried.")
    config: Any = model.config.get_text_config()
    pad = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size - 1, (len(LENGTHS), length), generator=draws)
    ids = ids + (ids >= pad).long()  # any token but padding
    mask = (torch.arange(length)[None] < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def find_attention(model: PreTrainedModel, blocks: tuple[str, ...], inputs: dict[str, Tensor]) -> str:
    """The name, inside every block, of the module that returns attention maps, the first that does; else "change"."""
    before = attention_of(model.config)
    found: dict[str, list[str]] = {block: [] for block in blocks}
    tokens = inputs["input_ids"].shape[1]

    def watch(block: str, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            maps = attention_in(output, tokens)
            if maps is not None and bool(torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-3)):
                found[block].append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(block, name))
        for block in found
        for name, module in model.get_submodule(block).named_modules()
        if name
    ]
    try:
        model.set_attn_implementation("eager")
        forward(model, inputs)
    except (ValueError, ImportError):  # a class whose attention cannot be chosen
        return CHANGE
    finally:
        for handle in handles:
            handle.remove()
        if before is not None:
            model.set_attn_implementation(before)
    first = next(iter(found.values()))
    return next((name for name in first if all(name in names for names in found.values())), CHANGE)


def _reads_both_ways(model: PreTrainedModel) -> bool:
    """Whether a token's state depends on tokens after it."""
    inputs = made_up(model)
    ids = inputs["input_ids"][:1, : LENGTHS[0]]
    other = torch.cat([ids[:, :-1], ids[:, 1:2]], dim=1)
    with evaluating(model):
        one, two = (forward(model.base_model, {"input_ids": each})[0] for each in (ids, other))
    return not torch.equal(one[:, 0], two[:, 0])


def _try(
    model: PreTrainedModel, blocks: tuple[str, ...], attention: str, stays: tuple[str, ...], inputs: dict[str, Tensor]
) -> float:
    """The largest difference, of the largest output: without padding beside with it, and rows together beside alone."""
    plain = _answers(model, inputs)
    errors = []
    try:
        for fraction in (1.0, 0.5):
            attach(model, TokenSkipping("power-bert", [fraction] * (len(blocks) - 1), attention, stays), blocks)
            together = _answers(model, inputs)
            if fraction == 1.0:
                errors.append(_distance(together, plain))
            alone = [
                _answers(model, {name: value[row : row + 1, :length] for name, value in inputs.items()})[0]
                for row, length in enumerate(LENGTHS)
            ]
            errors.append(_distance(together, alone))
    finally:
        detach(model, TokenSkipping.name)
    return max(errors)


def _answers(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The first output of each row, of real tokens only."""
    output = forward(model, inputs)[0].float()
    mask = inputs["attention_mask"].bool()
    if output.dim() == 3 and output.shape[1] == mask.shape[1]:
        return [row[real] for row, real in zip(output, mask, strict=True)]
    return list(output)


def _distance(ones: list[Tensor], others: list[Tensor]) -> float:
    largest = max(float(each.abs().max()) for each in others)
    return max(float((one - other).abs().max()) for one, other in zip(ones, others, strict=True)) / max(largest, 1e-30)
