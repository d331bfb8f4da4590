"""Tiny classifiers of several classes, texts of several lengths, and behaviors that are made up for tests."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from eckart.adaptive import attach
from eckart.adaptive.early_exit import HEADS, EarlyExit, pool
from eckart.adaptive.exit_rules import entropy
from eckart.calibration.layerwise.blocks import all_blocks, schedule_of

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "pad_token_id": 0}
LENGTHS = (9, 4, 7, 2, 6)


def classifier(kind="Bert", layers=4, attention=None, **options):
    """A random classifier without dropout whose numbers are not small."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": layers, "max_position_embeddings": 24, "initializer_range": 0.4}
    if kind == "Albert":
        sizes |= {"embedding_size": 8}
    if kind == "DistilBert":
        names = {"hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers",
                 "num_attention_heads": "n_heads"}  # fmt: skip
        sizes = {names.get(key, key): value for key, value in sizes.items()}
    if kind == "DebertaV2":
        sizes |= {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": 16}
    if kind == "ModernBert":
        sizes |= {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    config._attn_implementation = attention or ("eager" if kind in ("DebertaV2", "MPNet") else "sdpa")
    return getattr(transformers, f"{kind}ForSequenceClassification")._from_config(config).eval().requires_grad_(False)


def texts(lengths=LENGTHS, *, extra=0):
    """Rows of random tokens, padded on the right to the longest and `extra` more."""
    stream = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), max(lengths) + extra, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 40, (length,), generator=stream)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def blocks_of(model):
    return schedule_of(model, all_blocks(model), lambda: model(**texts((3,)))).steps


def with_exits(model, exits=(1, 2, 3), seed=3, **options):
    """The model with random heads, in place; of `texts()`, two rows leave at the first exit and one at each other."""
    sizes = {"pooling": "first", "features": 16, "width": 8, "outputs": model.config.num_labels}
    given = {"rule": "entropy", "threshold": 0.4, "problem": "single_label_classification", **sizes, **options}
    behavior = EarlyExit(exits=exits, **given)
    attach(model, behavior, blocks_of(model))
    torch.manual_seed(seed)
    states = model(**texts(), output_hidden_states=True).hidden_states  # of the whole model
    left = torch.ones(len(LENGTHS), dtype=torch.bool)
    for number, place in enumerate(exits):
        head = getattr(model, HEADS)[str(place)]
        for parameter in head.parameters():
            nn.init.normal_(parameter)
        with torch.no_grad():
            answers = head(pool(states[place], texts()["attention_mask"].bool(), behavior.pooling))
            scale = 1.0
            if behavior.rule == "entropy":
                for scale in torch.logspace(-2, 3, 800).tolist():
                    sure = entropy(answers * scale, behavior.problem) < 0.4
                    if int((sure & left).sum()) >= (1 if number else 2):
                        break
                left &= ~sure
            head.out.weight *= scale
            head.out.bias *= scale
    return model.requires_grad_(False)
