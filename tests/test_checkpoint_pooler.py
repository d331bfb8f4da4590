"""Encoders that were saved without their pooler are read, compressed and published without it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_data_models import bert_config, build, word_tokenizer
from transformers import AutoModel, BertForSequenceClassification, BertModel, ViTConfig, ViTModel

import eckart
from eckart.errors import CheckpointError

TEXTS = ["the cat sat", "a big red dog ran on the road", "good ."] * 8


def without(folder, *lost):
    file = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name not in lost}, file, {"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path):
    build(lambda config: BertModel(config, add_pooling_layer=False), bert_config()).save_pretrained(tmp_path / "m")
    word_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("stream", ["off", "on"])
def test_an_encoder_without_its_pooler_is_compressed(folder, tmp_path, stream):
    assert eckart.load(folder).pooler is None
    result = eckart.compress(str(folder), data=TEXTS, keep=0.6, stream=stream, output_dir=tmp_path / "out")
    assert not any("pooler" in site["site"] for site in result.report["sites"])
    assert not any("pooler" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        ours = eckart.load(tmp_path / "out")(**inputs).last_hidden_state
        plain = AutoModel.from_pretrained(tmp_path / "out")(**inputs).last_hidden_state  # its pooler is drawn at random
    torch.testing.assert_close(ours, plain)
    evaluated = eckart.evaluate(tmp_path / "out", folder, data=TEXTS, latency=False)
    assert evaluated["scores"]["1 - cosine to the original"]["eckart"] < 0.5


def test_other_encoders_are_read_so_too(tmp_path):
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=16,
                       patch_size=4)  # fmt: skip
    build(lambda config: ViTModel(config, add_pooling_layer=False), config).save_pretrained(tmp_path)
    assert eckart.load(tmp_path).pooler is None


def test_a_pooler_that_is_read_or_half_lost_is_missed(tmp_path):
    build(BertForSequenceClassification, bert_config()).save_pretrained(tmp_path / "head")
    lost = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    with pytest.raises(CheckpointError, match=r"2 tensors are missing: bert\.pooler\.dense\.bias"):
        eckart.load(without(tmp_path / "head", *lost))
    build(BertModel, bert_config()).save_pretrained(tmp_path / "half")
    with pytest.raises(CheckpointError, match=r"1 tensors are missing: pooler\.dense\.bias"):
        eckart.load(without(tmp_path / "half", "pooler.dense.bias"))
    build(BertModel, bert_config()).save_pretrained(tmp_path / "more")
    with pytest.raises(CheckpointError, match="2 tensors are missing"):
        eckart.load(without(tmp_path / "more", "pooler.dense.bias", "embeddings.LayerNorm.bias"))
