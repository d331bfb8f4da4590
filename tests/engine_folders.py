"""Tiny factored folders for the exports to engines, and what every engine must do with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import scaled
from mixed_forms import ATTENTION, put_form
from safetensors.torch import save_file
from tiny import DEMO, llama
from transformers import AutoTokenizer, BertConfig, BertModel

from eckart.checkpoint.description import attach_config
from eckart.checkpoint.load import load
from eckart.checkpoint.save import save
from eckart.data import Pooling

TEXTS = ["A short text.", "Another text, which is a good deal longer than the first one."]


def reader() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def sentence_folder(folder: Path) -> Path:
    """A sentence encoder with a dense layer and normalization; one joint group, pivoted and low-rank weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8256, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    model = scaled(BertModel(config)).eval()
    layer = "encoder.layer.0"
    put_form(model, [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")], "joint")
    put_form(model, [f"{layer}.intermediate.dense"], "pivoted")
    put_form(model, [f"{layer}.output.dense"], "lowrank")
    attach_config(model)
    save(model, folder, tokenizer=reader())
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "2_Dense").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    dense = {
        "in_features": 32,
        "out_features": 16,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    tensors = {"linear.weight": torch.randn(16, 32) / 6, "linear.bias": torch.randn(16) / 6}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    return folder


def causal_folder(folder: Path) -> Path:
    """A Llama with a joint group, pivoted and low-rank weights, in bfloat16."""
    model = llama(num_hidden_layers=1).float().eval()
    put_form(model, [f"model.layers.0.{part}" for part in ATTENTION], "joint", 0.9)
    put_form(model, ["model.layers.0.mlp.up_proj"], "pivoted", 0.8)
    put_form(
        model,
        [
            "model.layers.0.self_attn.o_proj",
        ],
        "lowrank",
        0.9,
    )
    attach_config(model)
    save(model.to(torch.bfloat16), folder, tokenizer=reader())
    return folder


def embeddings(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """A padded batch, and what PyTorch makes of it: hidden states and sentence embeddings."""
    batch = reader()(TEXTS, padding=True, return_tensors="pt")
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    pooling = Pooling.from_folder(folder)
    assert pooling is not None
    with torch.no_grad():
        made = load(folder)(**batch)
    pooled = pooling(made, batch["attention_mask"]).numpy()
    return {name: tensor.numpy() for name, tensor in batch.items()}, made.last_hidden_state.numpy(), pooled


def generate(run: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]], shapes: Mapping[str, Any],
             ids: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:  # fmt: skip
    """The likeliest tokens one after the other, with keys and values, as a program without eckart does it.

    Args:
        run: the engine.
        shapes: name of an input of keys or values -> (heads, width).
        ids: (B, T) prompts.
        mask: (B, T), 0 for padding, which is on the left.
        count: tokens to make.
    """
    batch = len(ids)
    past = {name: np.zeros((batch, heads, 0, width), np.float32) for name, (heads, width) in shapes.items()}
    made: list[np.ndarray] = []
    now = ids
    for _ in range(count):
        places = np.maximum(mask.cumsum(1) - 1, 0)[:, -now.shape[1] :]
        out = run({"input_ids": now, "attention_mask": mask, "position_ids": places, **past})
        past = {name: out[name.replace("past_key_values", "present")] for name in shapes}
        now = out["logits"][:, -1].argmax(-1)[:, None]
        made.append(now)
        mask = np.concatenate([mask, np.ones((batch, 1), mask.dtype)], 1)
    return np.concatenate(made, 1)


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, the first one padded on the left."""
    ids = torch.randint(5, 8000, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


def expected_tokens(folder: Path, count: int) -> np.ndarray:
    """What transformers generates of the prompts."""
    ids, mask = prompts()
    model = load(folder).float()
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return made[:, ids.shape[1] :].numpy()
