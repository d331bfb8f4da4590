"""A tiny classifier, separable data, and a loop that drives a room the way a trainer does."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from eckart.recovery.base import RecoveryContext

VOCABULARY, LENGTH = 32, 8


def bert(**options: Any) -> PreTrainedModel:
    """A random classifier of two classes without dropout."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16}
    config = transformers.BertConfig(**{**sizes, "num_attention_heads": 2, **none, **options})
    return transformers.BertForSequenceClassification(config).eval()


def gpt2(**options: Any) -> PreTrainedModel:
    """The same with Conv1D weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "pad_token_id": 0}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**{**sizes, **none, **options})).eval()


def batch(seed: int, rows: int = 16) -> dict[str, Tensor]:
    """Texts of low or of high tokens, and which."""
    stream = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (rows,), generator=stream)
    tokens = torch.randint(2, VOCABULARY // 2, (rows, LENGTH), generator=stream)
    tokens = tokens + labels[:, None] * (VOCABULARY // 2 - 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def logits(model: PreTrainedModel, seed: int = 99) -> Tensor:
    """Of held-out texts."""
    inputs = {key: value for key, value in batch(seed).items() if key != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs).logits


def accuracy(model: PreTrainedModel) -> float:
    """On held-out texts."""
    return float((logits(model).argmax(-1) == batch(99)["labels"]).float().mean())


def begun(model: PreTrainedModel, recovery: Any, steps: int, teacher: PreTrainedModel | None = None) -> PreTrainedModel:
    """The model as the room has prepared it."""
    recovery.prepare(model, RecoveryContext(teacher, "classification", None, steps))
    return model


def train(
    model: PreTrainedModel,
    recovery: Any,
    steps: int,
    teacher: PreTrainedModel | None = None,
    watch: Any = None,
    rate: float = 0.01,
) -> PreTrainedModel:
    """Train a prepared model; `watch(step)` is called after each step."""
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, rate)
    layers = "hidden_states" in recovery.wants
    for step in range(steps):
        inputs = batch(step)
        outputs = model(**inputs, output_hidden_states=layers)
        with torch.no_grad():
            told = teacher(**inputs, output_hidden_states=layers) if teacher is not None else None
        recovery.loss(outputs, told, inputs, outputs.loss).backward()
        recovery.after_backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        recovery.after_step(model, step)
        if watch is not None:
            watch(step)
    return model.eval()
