"""Text that a causal model samples from itself: calibration without any data.

Calibrating on a model's own samples is what LLM-QAT (Liu et al. 2023, arXiv 2305.17888) does for quantization.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from eckart.data.inference import device_of, evaluating, progress
from eckart.errors import NumericalError, UsageError

ROWS_AT_ONCE = 32
"""Windows sampled side by side. What is drawn does not depend on it."""


class _Draw(LogitsProcessor):
    """Draws the next token of each row at temperature 1 by inverting the cumulative distribution.

    `generate` then takes the maximum, which is the token drawn. The random numbers come from a table, so that the
    global random state does not change.
    """

    def __init__(self, uniform: Tensor, end: int | None, start: int | None) -> None:
        self.uniform = uniform  # (B, steps), float64
        self.end, self.start = end, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.double().softmax(-1).cumsum(-1)  # (B, V)
        if not bool(torch.isfinite(cumulative[:, -1]).all()):
            raise NumericalError(
                f"data 'self': the model's logits are not finite after {input_ids.shape[1]} tokens: "
                "check the weights, or load the model in float32"
            )
        level = self.uniform[:, input_ids.shape[1] - 1, None].to(scores.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, level, right=True).clamp(max=scores.shape[-1] - 1)  # (B, 1)
        if self.end is not None and self.start is not None and self.end != self.start:
            # A model that starts texts with BOS saw it after every EOS.
            drawn = torch.where(input_ids[:, -1:] == self.end, self.start, drawn)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


def sample_windows(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    num_samples: int,
    length: int,
    seed: int,
    disable: bool | None = None,
) -> Tensor:
    """Sample windows of text from a causal model, with a key-value cache, at temperature 1.

    A window starts with BOS. If neither the tokenizer nor the model has one, the model continues a token that is drawn
    uniformly and then dropped: the window starts with a token drawn from the model's own distribution.

    Args:
        model: A causal model with its language modeling head.
        tokenizer: The tokenizer.
        num_samples: Windows.
        length: Tokens a window.
        seed: Window i is drawn with random numbers keyed by (seed, i).
        disable: No progress bar.

    Returns:
        Token ids (num_samples, length).

    Raises:
        UsageError: If the model cannot generate.
        NumericalError: If its logits are not finite.
    """
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        raise UsageError(
            f"data 'self': {type(model).__name__} has no language modeling head to sample from: "
            "load it with AutoModelForCausalLM, or pass a file of text"
        )
    start = _first_known(getattr(tokenizer, "bos_token_id", None), model.config.get_text_config().bos_token_id)
    end = getattr(tokenizer, "eos_token_id", None)
    drop = 0 if start is not None else 1
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ordinary = [] if start is not None else [token for token in range(len(tokenizer)) if token not in special]

    own_config = model.generation_config
    windows = []
    with evaluating(model):
        # Repetition penalties, forced tokens and the like would change the model's distribution.
        model.generation_config = GenerationConfig()
        try:
            groups = [range(at, min(at + ROWS_AT_ONCE, num_samples)) for at in range(0, num_samples, ROWS_AT_ONCE)]
            for group in progress(groups, what="sampling text", disable=disable):
                generators = [_generator(seed, example) for example in group]
                uniform = torch.stack([torch.rand(length + 1, generator=g, dtype=torch.float64) for g in generators])
                if start is not None:
                    first = torch.full((len(group), 1), start)
                else:
                    picks = (uniform[:, -1] * len(ordinary)).long().clamp(max=len(ordinary) - 1)
                    first = torch.tensor(ordinary)[picks][:, None]
                if length + drop > 1:
                    first = first.to(device_of(model))
                    generate: Any = model.generate
                    first = generate(
                        inputs=first,
                        attention_mask=torch.ones_like(first),
                        logits_processor=LogitsProcessorList([_Draw(uniform, end, start)]),
                        generation_config=GenerationConfig(
                            do_sample=False, max_new_tokens=length + drop - 1, pad_token_id=0, use_cache=True
                        ),
                    ).cpu()
                windows.append(first[:, drop:])  # (b, length)
        finally:
            model.generation_config = own_config
    return torch.cat(windows)


def _generator(seed: int, example: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{example}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _first_known(*candidates: Any) -> int | None:
    return next((value for value in candidates if isinstance(value, int)), None)
