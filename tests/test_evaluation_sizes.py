"""Sizes of a model, and of its weights rounded to few bits."""

from __future__ import annotations

import pytest
import torch
from test_data_models import bert_config, build, gpt2, llama
from torch import nn
from transformers import BertModel

from eckart.errors import NumericalError, UsageError
from eckart.evaluation.rounding import count_rounded_bytes, round_to_nearest, round_weights
from eckart.evaluation.sizes import Size, count_sizes


class Factored(nn.Module):
    """Stands for a factored layer: two leaves, an index, a guard."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 2, bias=False), nn.Linear(2, 6)
        self.register_buffer("index", torch.arange(6, dtype=torch.int32))
        self.register_buffer("guard", torch.empty(0))
        self.register_buffer("cache", torch.zeros(100), persistent=False)

    def multiply_adds(self) -> int:
        return 1000


def test_what_is_stored_is_counted():
    model = nn.ModuleDict({"plain": nn.Linear(8, 6), "factored": Factored(), "table": nn.Embedding(5, 8)})
    found = count_sizes(model, ["plain", "factored"])
    assert found.modules["plain"] == Size(54, 216, 48)
    numbers = 8 * 2 + 2 * 6 + 6 + 6
    assert found.modules["factored"] == Size(numbers, 4 * numbers, 1000)
    assert found.modules["factored"].as_dict() == {"elements": numbers, "bytes": 4 * numbers, "multiply_adds": 1000}
    assert found.named == Size(54 + numbers, 216 + 4 * numbers, 1048)
    assert found.model == Size(54 + numbers + 40, 4 * (94 + numbers), 1048)
    assert count_sizes(model).modules == {}
    with pytest.raises(UsageError, match="'absent' is not in the model"):
        count_sizes(model, ["absent"])


def test_bytes_follow_the_dtype():
    assert count_sizes(nn.Linear(8, 6).bfloat16()).model == Size(54, 108, 48)
    assert count_sizes(nn.BatchNorm1d(3)).model == Size(13, 4 * 12 + 8, 0)  # its batch counter is an int64


def test_tied_weights_count_once():
    for tied in (True, False):
        model = llama(tie_word_embeddings=tied)
        found = count_sizes(model, ["lm_head", "model.embed_tokens"])
        vocabulary = 259 * 32
        assert found.model.elements == sum(p.numel() for p in model.parameters())
        assert found.named.elements == vocabulary * (1 if tied else 2)
        assert found.modules["lm_head"].elements == vocabulary
        assert found.named.multiply_adds == vocabulary
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = nn.Parameter(model[0].weight.data)  # one storage behind two parameters
    assert count_sizes(model).model == Size(16, 64, 32)


def test_sizes_equal_the_parameters_of_real_architectures():
    model = gpt2()
    found = count_sizes(model)
    assert found.model.elements == model.num_parameters()
    # Conv1D is counted like a Linear: q, k, v, o, up and down of two layers, and the tied head.
    assert found.model.multiply_adds == 2 * 12 * 32 * 32 + 259 * 32
    bert = build(BertModel, bert_config())
    assert count_sizes(bert).model.elements == bert.num_parameters()
    with torch.device("meta"):
        empty = build(BertModel, bert_config())
    assert count_sizes(empty).model == count_sizes(bert).model


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_to_the_nearest_level(bits):
    weight = torch.randn(5, 150, generator=torch.Generator().manual_seed(0))
    rounded = round_to_nearest(weight, bits)
    width, levels = (150, 127) if bits == 8 else (64, 7)
    for start in range(0, 150, width):
        part, near = weight[:, start : start + width], rounded[:, start : start + width]
        scale = part.abs().amax(1, keepdim=True) / levels
        if bits == 4:
            scale = scale.half().float()
        whole = near / scale
        assert torch.allclose(whole, whole.round(), atol=1e-3)
        assert whole.abs().max() <= levels + 1e-3
        assert ((near - part).abs() <= scale * (0.5 + 4e-3)).all()
    assert torch.equal(round_to_nearest(torch.zeros(3, 70), bits), torch.zeros(3, 70))
    assert round_to_nearest(weight.bfloat16(), bits).dtype == torch.bfloat16
    assert torch.isfinite(round_to_nearest(torch.full((2, 3), 1e-30), bits)).all()


def test_rounded_bytes_count_weights_and_scales():
    assert count_rounded_bytes(10, 100, 8) == 1000 + 40
    assert count_rounded_bytes(10, 100, 4) == 500 + 10 * 2 * 2
    assert count_rounded_bytes(1, 3, 4) == 2 + 2


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_leaves_the_model_and_counts_bytes(bits):
    for model in (llama(), gpt2()):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        names = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
        names.remove("lm_head")
        found = round_weights(model, names, bits)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
            changed = not torch.equal(value, found.model.state_dict()[name])
            assert changed == (name.removesuffix(".weight") in names)
        dense = count_sizes(model)
        expected = 0
        for name in names:
            module = model.get_submodule(name)
            shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
            expected += count_rounded_bytes(*shape, bits)
        assert found.named_bytes == expected
        weights = sum(4 * model.get_submodule(name).weight.numel() for name in names)
        assert found.model_bytes == dense.model.bytes - weights + expected


def test_conv1d_is_rounded_by_its_outputs():
    model = gpt2()
    name = "transformer.h.0.mlp.c_fc"
    weight = model.get_submodule(name).weight
    rounded = round_weights(model, [name], 8).model.get_submodule(name).weight
    assert torch.equal(rounded.T, round_to_nearest(weight.detach().T, 8))


def test_tied_head_is_rounded_and_counted_once():
    model = llama(tie_word_embeddings=True)
    found = round_weights(model, ["lm_head"], 8)
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight
    assert found.model_bytes == count_sizes(model).model.bytes - 4 * 259 * 32 + count_rounded_bytes(259, 32, 8)


def test_rounding_refuses_bits_and_modules_it_cannot_round():
    model = llama()
    with pytest.raises(UsageError, match="bits: 3"):
        round_weights(model, ["lm_head"], 3)
    with pytest.raises(UsageError, match="'model' is a LlamaModel"):
        round_weights(model, ["model"], 8)
    with pytest.raises(UsageError, match="'absent' is not in the model"):
        round_weights(model, ["absent"], 8)
    model.lm_head.weight.data[0, :3] = torch.inf
    with pytest.raises(NumericalError, match=r"lm_head\.weight: 3 numbers are not finite"):
        round_weights(model, ["lm_head"], 8)
