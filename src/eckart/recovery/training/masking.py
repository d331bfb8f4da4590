"""Tokens masked for masked language modeling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHARE = 0.15


def mask_tokens(batch: dict[str, Tensor], tokenizer: Any, vocabulary: int, seed: int) -> dict[str, Tensor]:
    """BERT's masking: of 15% of the real tokens, 80% become the mask, 10% another token, 10% stay.

    Devlin et al. 2018, arXiv 1810.04805.

    Args:
        batch: input_ids (B, T) and attention_mask.
        tokenizer: names the mask and the special tokens, which are never masked.
        vocabulary: number of tokens to draw others from.
        seed: of this draw: the same seed masks alike.

    Returns:
        The batch with masked ids, and labels that are -100 where nothing was masked. One token of a batch is masked
        at least, if there is any.
    """
    ids = batch["input_ids"]
    draw = torch.Generator().manual_seed(seed)
    special = torch.tensor(sorted(tokenizer.all_special_ids), device=ids.device)
    free = ~torch.isin(ids, special)
    if "attention_mask" in batch:
        free &= batch["attention_mask"].bool()
    chance = torch.rand(ids.shape, generator=draw).to(ids.device).masked_fill(~free, 2.0)
    chosen = (chance < SHARE) | ((chance == chance.min()) & free)
    kind = torch.rand(ids.shape, generator=draw).to(ids.device)
    other = torch.randint(vocabulary, ids.shape, generator=draw).to(ids.device)
    masked = torch.where(chosen & (kind < 0.8), tokenizer.mask_token_id, ids)
    masked = torch.where(chosen & (kind >= 0.9), other, masked)
    return {**batch, "input_ids": masked, "labels": torch.where(chosen, ids, -100)}
