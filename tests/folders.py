"""Folders of tiny models, dense and factored, for the commands that read and write such folders."""

from __future__ import annotations

from pathlib import Path

import torch
from architectures import scaled
from tiny import DEMO, llama, text
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, PreTrainedModel

import eckart


def model_folders(folder: Path, keep: float, rows: list[str]) -> Path:
    """A causal model, a classifier and a bare encoder, each beside its factored copy NAME-PERCENT, text and rows.

    Args:
        folder: where `llama`, `classifier`, `bare`, `text.txt` and `rows.tsv` are put.
        keep: of the factored copies.
        rows: text, tab, label.

    Returns:
        The folder.
    """
    reader = AutoTokenizer.from_pretrained(DEMO)
    if reader.pad_token_id is None:
        reader.pad_token = reader.eos_token
    text(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    models: dict[str, PreTrainedModel] = {
        "llama": llama(num_hidden_layers=2).to(torch.float32),
        "classifier": scaled(BertForSequenceClassification(config)),
        "bare": scaled(BertModel(config)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        reader.save_pretrained(folder / name)
        eckart.compress(model, reader, method="svd", keep=keep).save_pretrained(folder / f"{name}-{keep * 100:.0f}")
    (folder / "rows.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    return folder
