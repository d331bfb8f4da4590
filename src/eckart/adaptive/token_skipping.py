"""Token skipping: between two blocks, the tokens leave that get the least attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.adaptive.attach import blocks_of_behaviors, walk_of
from eckart.adaptive.behavior import Behavior
from eckart.adaptive.mask import with_mask
from eckart.adaptive.walk import Walk
from eckart.errors import UsageError
from eckart.forms.transformers_internals import attention_of
from eckart.linalg import count_kept, keep_above, keep_most, pick, relative, significance

RULES = {"power-bert": "fractions", "ltp": "thresholds"}
"""Rule -> what it is told of each block."""

KEEP_ALL = {"power-bert": 1.0, "ltp": 0.0}
"""Rule -> the level at which no token but padding leaves."""

CHANGE = "change"
"""In place of an attention's name: the stand-in where a model shows none."""

STAYS = ("first", "last")
"""Tokens that may be named as staying: the first real one of a row, or the last."""


class TokenSkipping(Behavior):
    """After block l each row goes on with `f_l n` of its n tokens (PoWER-BERT), or with those above `t_l` (LTP).

    The score of a token is the attention that it receives in block l: the sum over heads and real queries. LTP's
    threshold is of the score as a multiple of the mean over the row's tokens. A token that leaves keeps the state that
    it left with, so that outputs have their usual shapes; padding leaves first.

    Args:
        rule: "power-bert" or "ltp".
        levels: f or t after each block but the last.
        attention: name, inside a block, of the module that returns attention maps; "change" for the stand-in, the norm
            of the change of the hidden state in the block.
        stays: which of "first" and "last" always stay.
    """

    name: ClassVar[str] = "token-skipping"
    title: ClassVar[str] = "tokens that get the least attention leave between the blocks"
    paper: ClassVar[str] = "Goyal et al. 2020, ICML, arXiv 2001.08950; Kim et al. 2022, KDD, arXiv 2107.00910"
    keywords: ClassVar[tuple[str, ...]] = ("skip_tokens",)

    def __init__(
        self, rule: str, levels: Iterable[float], attention: str = CHANGE, stays: Iterable[str] = ("first",)
    ) -> None:
        self.rule = rule
        self.levels = tuple(float(level) for level in levels)
        self.attention = attention
        self.stays = tuple(stays)
        if rule not in RULES:
            raise UsageError(f"rule: {rule!r} is not one of {', '.join(RULES)}")
        high = 1 if rule == "power-bert" else float("inf")
        if not all(0 <= level <= high for level in self.levels):
            raise UsageError(f"{RULES[rule]}: {list(self.levels)} are not all in [0, {high:g}]")
        if not set(self.stays) <= set(STAYS):
            raise UsageError(f"stays: {list(self.stays)} are not all of {', '.join(STAYS)}")
        self._before: str | None = None  # the attention implementation that the model had

    def spec(self) -> dict[str, Any]:
        """The arguments."""
        levels = [round(level, 6) for level in self.levels]
        return {"rule": self.rule, RULES[self.rule]: levels, "scores": self.attention, "stays": list(self.stays)}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`spec`."""
        rule = spec["rule"]
        return cls(rule, spec[RULES.get(rule, "fractions")], spec["scores"], spec["stays"])

    def misfit(self, model: PreTrainedModel, blocks: int) -> str | None:
        """The schedule is for another number of blocks."""
        if len(self.levels) != blocks - 1:
            return f"it says what stays after {len(self.levels)} blocks, and {blocks - 1} have others after them"
        return None

    def in_words(self, blocks: int) -> str:
        """One line for cards and tables."""
        if self.rule == "ltp":
            return f"tokens below a learned attention leave after each of {blocks - 1} blocks"
        return f"{self.levels[-1]:.0%} of the tokens reach the last of {blocks} blocks"

    def attached(self, model: PreTrainedModel, blocks: tuple[str, ...]) -> None:
        """Let the model show its attention: only eager attention returns maps."""
        if self.attention == CHANGE:
            return
        self._before = attention_of(model.config)
        model.set_attn_implementation("eager")
        for block in dict.fromkeys(blocks):
            model.get_submodule(f"{block}.{self.attention}").register_forward_hook(_Watch(model))

    def detached(self, model: PreTrainedModel, blocks: tuple[str, ...]) -> None:
        """Undo :meth:`attached`."""
        if self.attention == CHANGE:
            return
        for block in dict.fromkeys(blocks):
            hooks = model.get_submodule(f"{block}.{self.attention}")._forward_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Watch)]:
                del hooks[key]
        if self._before is not None:
            model.set_attn_implementation(self._before)

    def before_block(self, walk: Walk, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Note what the block reads; hide places that hold no token where the model made no mask."""
        memory = walk.memory[self.name]
        memory["read"] = walk.hidden
        if walk.done == 0:
            memory["lengths"] = walk.real.sum(1)
        memory.pop("attention", None)
        if walk.tokens is not None and not bool(walk.real.all()):
            block = blocks_of_behaviors(walk.model)[walk.done]
            args, kwargs = with_mask(walk.model.get_submodule(block), args, kwargs, walk.real)
        return args, kwargs

    def after_block(self, walk: Walk) -> None:
        """Let tokens leave."""
        memory = walk.memory[self.name]
        if walk.is_last or walk.options[self.name].get("skip_tokens", True) is False:
            return
        level, kept = self.levels[walk.done - 1], walk.real
        if level != KEEP_ALL[self.rule]:  # else there is no need of scores
            lengths = memory["lengths"][walk.rows]
            kept = choose_tokens(self.rule, level, self._scores(walk, memory), walk.real, lengths, self.stays)
        if torch.equal(kept, walk.real) and int(kept.sum(1).max()) == kept.shape[1]:
            return  # the longest row keeps all: nothing would become smaller
        places, there = pick(kept)
        walk.keep_tokens(places.masked_fill(~there, -1))

    def _scores(self, walk: Walk, memory: dict[str, Any]) -> Tensor:
        """(r, t); rows leave after tokens do, so they are those that the block was called with."""
        if self.attention == CHANGE:
            return hidden_change(memory["read"], walk.hidden) * walk.real
        return significance(memory["attention"], walk.real)


def choose_tokens(
    rule: str, level: float, scores: Tensor, real: Tensor, lengths: Tensor, stays: Iterable[str]
) -> Tensor:
    """The tokens that go on, (B, T) bool.

    Args:
        rule: "power-bert" or "ltp".
        level: the fraction, or the threshold.
        scores: (B, T).
        real: (B, T) bool.
        lengths: tokens that each row had before the first block, (B,).
        stays: which of "first" and "last" stay whatever their score.
    """
    always = staying(real, stays)
    if rule == "ltp":
        return keep_above(relative(scores, real), real, level, always)
    return keep_most(scores, real, count_kept(lengths, level), always)


def staying(real: Tensor, stays: Iterable[str]) -> Tensor:
    """The first or last real token of each row, (B, T) bool."""
    found = torch.zeros_like(real)
    for which in stays:
        place = real.int().argmax(1) if which == "first" else real.shape[1] - 1 - real.flip(1).int().argmax(1)
        found = found.scatter(1, place[:, None], value=True)
    return found & real


def hidden_change(read: Tensor, written: Tensor) -> Tensor:
    """What a block changes of each token, `|| f(x)_i - x_i ||`, (B, T): a stand-in for the attention it receives."""
    dtype = torch.promote_types(written.dtype, torch.float32)
    return (written.to(dtype) - read.to(dtype)).norm(dim=-1)


def attention_in(output: Any, tokens: int | None = None) -> Tensor | None:
    """The attention maps (B, heads, T, T) among what a module returns; None where there are none."""
    if not isinstance(output, tuple | list):
        return None
    for each in output[1:]:
        if isinstance(each, Tensor) and each.dim() == 4 and each.shape[2] == each.shape[3]:
            return each if tokens is None or each.shape[3] == tokens else None
    return None


class _Watch:
    """Hook after an attention module: keeps its maps for the pass under way."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, _: nn.Module, args: Any, output: Any) -> None:
        walk = walk_of(self.model)
        if walk is not None and TokenSkipping.name in walk.memory:
            walk.memory[TokenSkipping.name]["attention"] = attention_in(output)
