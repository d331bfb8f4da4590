"""Tokens that leave while a model is trained: masked, so that gradients reach what decides it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.adaptive.mask import with_mask
from eckart.adaptive.token_skipping import CHANGE, attention_in, choose_tokens, hidden_change, staying
from eckart.linalg import relative, retained_fractions, significance, soft_extract, soft_keep
from eckart.recovery.skipping.trial import SkippingPlaces

ATTRIBUTE = "eckart_token_skipping"
"""Attribute of the model that holds the module while it is trained."""

POINTS = 32
"""Retention parameters of a block: the k-th best of n tokens has that at `k / n` of them."""

TEMPERATURE = 0.1
"""Of LTP's soft masks, for scores whose mean is 1."""

HIGHEST_START = 0.5
"""LTP's thresholds rise from 0 to this at first."""


class SkipTraining(nn.Module):
    """What is learned of which tokens leave, and hooks on the blocks that let them.

    While it is soft, the hidden states that a block puts out are multiplied by a mask in [0, 1]: of PoWER-BERT the
    retention parameter of the token's place in the order of scores, of LTP the sigmoid of its score over the
    threshold. Once `levels` are set it is hard: tokens that have left are hidden from attention and keep their state,
    which gives what taking them out of the sequence gives.

    Args:
        rule: "power-bert" or "ltp".
        places: blocks and attention.
        stays: which of "first" and "last" stay.
        rate: parameters are this times what is trained, so that they can move in as few steps as the model is trained
            in, at a learning rate that is right for its weights.

    Attributes:
        levels: fractions or thresholds, once it is hard.
        kept: tokens of each row that were left after each block in the last pass, (B, blocks), the whole row first.
    """

    def __init__(self, rule: str, places: SkippingPlaces, stays: Sequence[str], rate: float) -> None:
        super().__init__()
        self.rule, self.stays, self.rate = rule, tuple(stays), rate
        self.attention = places.attention
        self.blocks = len(places.blocks)
        self.levels: list[float] | None = None
        shape = (self.blocks - 1, POINTS) if rule == "power-bert" else (self.blocks - 1,)
        self.moved = nn.Parameter(torch.zeros(shape))
        self._handles: list[Any] = []
        self._clear(None)

    # -- what is learned ------------------------------------------------------------------------------------

    def retention(self) -> Tensor:
        """PoWER-BERT's parameters, (blocks - 1, P), in [0, 1]."""
        return (1 - self.rate * self.moved).clamp(0, 1)

    def thresholds(self) -> Tensor:
        """LTP's, (blocks - 1,), of scores whose mean is 1."""
        return (self.start() + self.rate * self.moved).clamp_min(0)

    def start(self) -> Tensor:
        """LTP's thresholds before they are learned."""
        return torch.linspace(0, HIGHEST_START, self.blocks, device=self.moved.device)[1:]

    def learned(self) -> list[float]:
        """The schedule, or the thresholds, as they are now."""
        with torch.no_grad():
            return retained_fractions(self.retention()) if self.rule == "power-bert" else self.thresholds().tolist()

    def penalty(self) -> Tensor:
        """What is left: of PoWER-BERT `sum_l l sum_k r_lk`, of LTP the mean mask; either as a part of all tokens."""
        if self.rule == "power-bert":
            order = torch.arange(1, self.blocks, device=self.moved.device)
            return (self.retention().mean(1) * order).sum() / order.sum()
        return torch.stack([mask for _, mask in sorted(self._masks.items())]).mean()

    def project(self) -> None:
        """Bring the parameters back to where they can be."""
        with torch.no_grad():
            if self.rule == "power-bert":
                self.moved.clamp_(0, 1 / self.rate)
            else:
                self.moved.copy_(self.moved.maximum(-self.start() / self.rate))

    # -- hooks ----------------------------------------------------------------------------------------------

    def install(self, model: PreTrainedModel, places: SkippingPlaces) -> None:
        """Put it on a model, whose attention must be eager where its maps are read."""
        model.add_module(ATTRIBUTE, self)
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for place, name in enumerate(places.blocks):
            block = model.get_submodule(name)
            self._handles.append(block.register_forward_pre_hook(_Before(self, place), with_kwargs=True))
            self._handles.append(block.register_forward_hook(_After(self, place), with_kwargs=True))
            if self.attention != CHANGE:
                shown = block.get_submodule(self.attention)
                self._handles.append(shown.register_forward_hook(_Maps(self, place)))

    def uninstall(self, model: PreTrainedModel) -> None:
        """Take it off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._clear(None)
        delattr(model, ATTRIBUTE)

    @property
    def kept(self) -> Tensor:
        """See the class."""
        assert self._first is not None
        return torch.stack([self._first.sum(1), *(self._left[i].sum(1) for i in range(self.blocks - 1))], dim=1)

    def kept_before(self) -> Tensor:
        """Tokens of each row of the last pass, (B,)."""
        assert self._first is not None
        return self._first.sum(1)

    def _clear(self, mask: Tensor | None) -> None:
        # Each block's own entry is written by it alone: blocks that gradient checkpointing runs again write the same.
        self._given: Tensor | None = mask
        self._first: Tensor | None = None
        self._left: dict[int, Tensor] = {}
        self._maps: dict[int, Tensor] = {}
        self._masks: dict[int, Tensor] = {}

    def _begin(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._clear(kwargs.get("attention_mask"))

    def before(self, place: int, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Hide what has left from attention."""
        if place == 0:
            hidden = args[0] if args else kwargs["hidden_states"]
            given = self._given
            self._first = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            if given is not None and given.shape == self._first.shape:
                self._first = given.to(hidden.device).bool()
        elif self.levels is not None:
            return with_mask(block, args, kwargs, self._left[place - 1])
        return args, kwargs

    def after(self, place: int, read: Tensor, output: Any) -> Any:
        """Multiply what a block puts out by a soft mask, or let tokens leave."""
        written = output[0] if isinstance(output, tuple | list) else output
        assert self._first is not None
        real = self._left[place - 1] if place and self.levels is not None else self._first
        last = place == self.blocks - 1
        if self.levels is not None:
            written = torch.where(real[..., None], written, read) if place else written
            if not last:
                scores = self._scores(place, read, written, real)
                lengths = self._first.sum(1)
                self._left[place] = choose_tokens(self.rule, self.levels[place], scores, real, lengths, self.stays)
        elif not last:
            mask = self._soft_mask(place, self._scores(place, read, written, real), real)
            if self.rule == "ltp":
                self._masks[place] = mask[real].mean()
            written = written * mask[..., None].to(written.dtype)
        return (written, *output[1:]) if isinstance(output, tuple | list) else written

    def _scores(self, place: int, read: Tensor, written: Tensor, real: Tensor) -> Tensor:
        if self.attention == CHANGE:
            return hidden_change(read, written).detach() * real
        maps = self._maps[place]
        return significance(maps, real) if self.rule == "ltp" else significance(maps.detach(), real)

    def _soft_mask(self, place: int, scores: Tensor, real: Tensor) -> Tensor:
        if self.rule == "power-bert":
            mask = soft_extract(scores, real, self.retention()[place])
        else:
            mask = soft_keep(relative(scores, real), self.thresholds()[place], TEMPERATURE)
        return mask.masked_fill(staying(real, self.stays) | ~real, 1.0)


class _Before:
    def __init__(self, training: SkipTraining, place: int) -> None:
        self.training, self.place = training, place

    def __call__(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return self.training.before(self.place, block, args, kwargs)


class _After:
    def __init__(self, training: SkipTraining, place: int) -> None:
        self.training, self.place = training, place

    def __call__(self, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        return self.training.after(self.place, args[0] if args else kwargs["hidden_states"], output)


class _Maps:
    def __init__(self, training: SkipTraining, place: int) -> None:
        self.training, self.place = training, place

    def __call__(self, _: nn.Module, args: Any, output: Any) -> None:
        maps = attention_in(output)
        assert maps is not None
        self.training._maps[self.place] = maps
