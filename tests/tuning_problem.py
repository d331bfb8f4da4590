"""A tiny classifier, separable data, a loop that drives a recovery as the training loop does, and tiny folders."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import scaled
from tiny import DEMO, llama, text
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

import eckart
from eckart.recovery.base import RecoveryContext

VOCABULARY, LENGTH = 32, 8

QUICK = {"max_steps": 6, "batch_size": 4, "max_seq_length": 16, "learning_rate": 3e-3, "num_samples": 14,
         "eval_samples": 8}  # fmt: skip
"""Options of a training that takes half a second; its 14 rows make an epoch of four steps, the last one smaller."""


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


def prepare_model(
    model: PreTrainedModel, recovery: Any, steps: int, teacher: PreTrainedModel | None = None
) -> PreTrainedModel:
    """The model as the recovery has prepared it."""
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
    layers = "hidden_states" in recovery.needed_outputs
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


# -- folders ---------------------------------------------------------------------------------------------


def reader() -> Any:
    """The demo model's tokenizer with a mask token."""
    found = AutoTokenizer.from_pretrained(DEMO)
    found.add_special_tokens({"mask_token": "<mask>"})
    if found.pad_token_id is None:
        found.pad_token = found.eos_token
    return found


def bert_config(**more: Any) -> BertConfig:
    """Of a tiny encoder for the demo model's tokenizer."""
    sizes = {"vocab_size": 8256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return BertConfig(**{**sizes, "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0, **more})


@cache
def tuning_folders() -> Path:
    """Once a process: `dense`, a causal model; `lowrank` and `pivoted`, the same factored; `deep`, one with layers for
    sandwiches; `bert` and `bert-mlm`, factored encoders; `classifier`, one of four blocks; `text.txt` and `rows.tsv`.
    Only to be read.
    """
    folder = Path(tempfile.mkdtemp(prefix="eckart-tuning-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = reader()
    (folder / "text.txt").write_text(text(folder).read_text()[:12_000])
    for name, layers in (("deep", 4), ("dense", 2)):
        dense = llama(num_hidden_layers=layers, tie_word_embeddings=True).to(torch.float32)
        dense.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for form in ("lowrank", "pivoted"):
        result = eckart.compress(dense, tokenizer, method="svd", keep=0.5, form=form)
        result.save_pretrained(folder / form)
    torch.manual_seed(0)
    for name, kind in (("bert", BertModel), ("bert-mlm", BertForMaskedLM)):
        result = eckart.compress(scaled(kind(bert_config())), tokenizer, method="svd", keep=0.5)
        result.save_pretrained(folder / name)
    deep = scaled(BertForSequenceClassification(bert_config(num_labels=2, num_hidden_layers=4)))
    eckart.compress(deep, tokenizer, method="svd", keep=0.5).save_pretrained(folder / "classifier")
    words = ["yes good fine", "no bad poor"]
    rows = [f"{words[i % 2]} {i}\t{words[(i // 2) % 2]}\t{i % 2}\t{(i % 2) * 2.5}" for i in range(40)]
    (folder / "rows.tsv").write_text("text\tother\tlabel\tscore\n" + "\n".join(rows) + "\n")
    return folder


@contextmanager
def interrupted(step: int) -> Iterator[None]:
    """A training inside is interrupted in its `step`-th step, as by Ctrl-C."""
    from eckart.recovery.training import loop

    own, calls = loop._add_gradients, []

    def counted(*args: Any) -> float:
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return own(*args)

    loop._add_gradients = counted
    try:
        yield
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("the training ended before")
    finally:
        loop._add_gradients = own


def is_closed_form(recovery: Any) -> bool:
    """Whether a recovery has no steps."""
    from eckart.recovery import ClosedFormRecovery

    return issubclass(recovery, ClosedFormRecovery)
