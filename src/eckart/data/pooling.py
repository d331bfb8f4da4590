"""Sentence embeddings from token embeddings, as a sentence-transformers model makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import UsageError

MODES = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean")
"""The modes there are."""


@dataclass(frozen=True)
class Pooling:
    """How a sentence embedding is made: what text is read, how its tokens are pooled, and what follows.

    Attributes:
        modes: One or several of :data:`MODES`; several are concatenated. cls is the first real token, lasttoken the
            last; mean_sqrt_len_tokens divides the sum by the root of the length; weightedmean weighs the tokens by
            their places, 1, 2, ...
        normalize: Whether the result is scaled to length 1 at last.
        steps: What is computed of the pooled tokens before that: dense layers, normalizations.
        truncate: Numbers of the embedding that are kept; None for all.
        prompt: Text that is put before every other.
        include_prompt: Whether the prompt's tokens are pooled too.
        prompt_tokens: How many they are, see :meth:`reading`.
        lower_case: Whether the text is written in lower case first.
        max_seq_length: Tokens a text; None for what the tokenizer says.
        left_out: Parts of the model that are not computed here, in words.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    truncate: int | None = None
    prompt: str = ""
    include_prompt: bool = True
    prompt_tokens: int = 0
    lower_case: bool = False
    max_seq_length: int | None = None
    left_out: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Pooling | None:
        """Read it from a sentence-transformers folder, see :func:`eckart.data.sentence_folder.read_pooling`."""
        from eckart.data.sentence_folder import read_pooling

        return read_pooling(Path(folder))

    def reading(self, tokenizer: Any) -> Pooling:
        """The same with the number of the prompt's tokens, which a tokenizer says."""
        if self.include_prompt or not self.prompt:
            return self
        ids = tokenizer(self.text(""))["input_ids"]
        return replace(self, prompt_tokens=len(ids) - (ids[-1:] and ids[-1] in tokenizer.all_special_ids))

    def text(self, text: str) -> str:
        """A text as it is read."""
        text = self.prompt + text
        return text.lower() if self.lower_case else text

    def __call__(self, output: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Pool.

        Args:
            output: A model's output, or token embeddings (B, T, d).
            attention_mask: (B, T), 1 for real tokens; None if all are.

        Returns:
            Sentence embeddings (B, d), or (B, k d) for k modes; float32 at least. Gradients pass through.
        """
        hidden = last_hidden_state(output)
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        batch, length = hidden.shape[:2]
        if attention_mask is None or attention_mask.shape[1] != length:
            attention_mask = hidden.new_ones(batch, length)
        real = attention_mask.to(hidden.device).bool()  # (B, T)
        place = real.int().cumsum(1)  # 1 for the first real token
        counted = real & (place > self.prompt_tokens)
        pooled = torch.cat([_pool(mode, hidden, counted, place) for mode in self.modes], dim=-1)
        for step in self.steps:
            pooled = step(pooled)
        pooled = pooled[..., : self.truncate]
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense layer on pooled tokens: `y = f(W x + b)`, with x or a projection of it added where there is a residual.

    Attributes:
        weight: W, (out, in).
        bias: b, or None.
        activation: f.
        residual: projection of x, (out, in); "same" for x itself; None for none.
    """

    weight: Tensor
    bias: Tensor | None
    activation: nn.Module
    residual: Tensor | str | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to x (B, in), giving (B, out)."""
        bias = self.bias.to(x) if self.bias is not None else None
        y: Tensor = self.activation(nn.functional.linear(x, self.weight.to(x), bias))
        if isinstance(self.residual, Tensor):
            return y + nn.functional.linear(x, self.residual.to(x))
        return y + x if self.residual is not None else y


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """A layer norm on pooled tokens.

    Attributes:
        weight: (d,).
        bias: (d,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to x (B, d)."""
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight.to(x), self.bias.to(x))


def normalize(x: Tensor) -> Tensor:
    """Rows scaled to length 1."""
    return nn.functional.normalize(x, dim=-1)


def find_hidden_state(output: Any) -> Tensor | None:
    """Return the token embeddings of a model's output (B, T, d), the encoder's of an encoder-decoder; None if none."""
    if isinstance(output, Tensor):
        found: Any = output
    else:
        states = getattr(output, "hidden_states", None)
        choices = (
            getattr(output, "encoder_last_hidden_state", None),
            getattr(output, "last_hidden_state", None),
            states[-1] if states else None,
        )
        found = next((choice for choice in choices if choice is not None), None)
    return found if isinstance(found, Tensor) and found.dim() == 3 else None


def last_hidden_state(output: Any) -> Tensor:
    """Return the token embeddings of a model's output.

    Args:
        output: A model's output (the encoder's side of an encoder-decoder), or the embeddings themselves.

    Returns:
        (B, T, d).

    Raises:
        UsageError: If there are none.
    """
    found = find_hidden_state(output)
    if found is None:
        raise UsageError(
            f"{type(output).__name__} holds no last hidden state (batch, tokens, width) to pool: "
            "load the model with AutoModel"
        )
    return found


def _pool(mode: str, hidden: Tensor, counted: Tensor, place: Tensor) -> Tensor:
    rows = torch.arange(hidden.shape[0], device=hidden.device)  # `len` would fix the size in a traced graph
    if mode == "cls":
        return hidden[rows, counted.int().argmax(1)]  # the first real token, on whichever side the padding is
    if mode == "lasttoken":
        return hidden[rows, hidden.shape[1] - 1 - counted.int().flip(1).argmax(1)]
    if mode == "max":
        return hidden.masked_fill(~counted[..., None], -torch.inf).amax(1)
    weights = (counted * place if mode == "weightedmean" else counted)[..., None].to(hidden.dtype)
    total = weights.sum(1).clamp(min=1e-9)
    # Padding is masked before the sum: an embedding that is not finite there does no harm.
    summed = (hidden.masked_fill(~counted[..., None], 0) * weights).sum(1)
    return summed / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)
