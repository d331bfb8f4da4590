"""Value heads that may have another width: found by trial, refused with a reason, and narrowed exactly."""

import copy
from typing import Any

import pytest
import torch
from architectures import BY_NAME, VOCABULARY, output, scaled
from problems import close, normal
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MiMoV2FlashConfig,
    MiMoV2FlashForCausalLM,
    PreTrainedModel,
    YoutuConfig,
    YoutuForCausalLM,
)

from eckart.errors import UsageError
from eckart.model import dense_weight, find_sites
from eckart.model.value_heads import ValueHeads, find_head_width, narrowed_model, possible_head_widths

BODY: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 10,
}  # fmt: skip


def youtu(**more: Any) -> PreTrainedModel:
    return scaled(YoutuForCausalLM(YoutuConfig(**BODY, **LATENT, **more))).eval()


def deepseek() -> PreTrainedModel:
    return scaled(DeepseekV3ForCausalLM(DeepseekV3Config(**BODY, **LATENT, **EXPERTS, first_k_dense_replace=1))).eval()


def mimo() -> PreTrainedModel:
    """Two heads share the values of one in the first layer, none in the second."""
    options = {"num_key_value_heads": 2, "head_dim": 12, "v_head_dim": 8}
    return scaled(MiMoV2FlashForCausalLM(MiMoV2FlashConfig(**BODY, **EXPERTS, **options))).eval()


INPUTS = {"input_ids": torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))}


def found_in(model: PreTrainedModel) -> Any:
    return find_head_width(model, possible_head_widths(model, find_sites(model).chosen), INPUTS)


@pytest.mark.parametrize(
    ("make", "width", "made", "writer"),
    [(youtu, 10, (4, 4), "kv_b_proj"), (deepseek, 10, (4, 4), "kv_b_proj"), (mimo, 8, (2, 4), "v_proj")],
    ids=["youtu", "deepseek", "mimo"],
)
def test_found_and_narrowed_exactly(make, width, made, writer):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = found_in(model)
    assert (found.key, found.width, len(found.layers)) == ("v_head_dim", width, 2)
    for i, layer in enumerate(found.layers):
        assert layer.reader == f"model.layers.{i}.self_attn.o_proj"
        assert layer.writer == f"model.layers.{i}.self_attn.{writer}"
        assert (layer.heads, layer.made, layer.each, layer.last) == (4, made[i], True, True)
    # Values of rank 5, in directions of their own for each head: nothing is lost with five numbers.
    solved = {}
    expected = copy.deepcopy(model)
    for seed, layer in enumerate(found.layers):
        basis = torch.linalg.qr(normal(layer.made, width, 5, seed=seed)).Q
        reader, maker = expected.get_submodule(layer.reader), expected.get_submodule(layer.writer)
        rows = layer.changed(dense_weight(maker).double(), basis @ basis.mT)
        dense_weight(maker).copy_(rows)
        weight = dense_weight(reader).double()
        each = basis.repeat_interleave(4 // layer.made, 0)
        narrow = torch.einsum("mhd,hdr->mhr", weight.unflatten(1, (4, width)), each).flatten(1)
        solved[layer.reader] = (basis.mT, narrow, None)
    small = narrowed_model(expected, found, 5, solved)
    assert small.config.v_head_dim == 5
    again = type(model)(small.config)
    again.load_state_dict(small.state_dict(), strict=True)
    for one in (small, again.eval()):
        close(output(one, INPUTS), output(expected, INPUTS), 1e-4)
    assert model.config.v_head_dim == width
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, module in again.named_modules():
        numbers = {k: v for k, v in vars(module).items() if isinstance(v, int) and k != "training"}
        assert numbers == {k: v for k, v in vars(small.get_submodule(name)).items() if k in numbers}


def test_rows_may_lie_elsewhere():
    rows = normal(20, 3)
    directions = normal(2, 1, 4, seed=1)
    values = {
        (True, True): [6, 7, 8, 9, 16, 17, 18, 19],
        (True, False): [0, 1, 2, 3, 10, 11, 12, 13],
        (False, True): list(range(12, 20)),
        (False, False): list(range(8)),
    }
    for (each, last), places in values.items():
        layer = ValueHeads("r", "w", 4, 2, 2, each=each, last=last)
        made = layer.changed(rows, directions)
        others = [i for i in range(20) if i not in places]
        expected = torch.einsum("hrd,hdn->hrn", directions, rows[places].unflatten(0, (2, 4))).flatten(0, 1)
        assert made.shape == (14, 3)
        where = {(True, True): [6, 13], (True, False): [0, 7], (False, True): [12, 13], (False, False): [0, 1]}
        close(made[where[each, last]], expected, 1e-12)
        close(made[[i for i in range(14) if i not in where[each, last]]], rows[others], 0)
        same = layer.changed(rows, torch.eye(4, dtype=torch.float64).expand(2, -1, -1))
        close(same, rows, 1e-12)


def test_layout_is_tried(monkeypatch):
    """Values in front of the keys of each head, as no class of transformers has them."""
    model = youtu()
    plain = output(model, INPUTS)
    for block in model.model.layers:
        attention = block.self_attn
        with torch.no_grad():
            parts = attention.kv_b_proj.weight.unflatten(0, (4, 16))
            attention.kv_b_proj.weight.copy_(torch.cat([parts[:, 6:], parts[:, :6]], 1).flatten(0, 1))
        attention.__class__ = ValuesFirst
    close(output(model, INPUTS), plain, 1e-5)
    possible = possible_head_widths(model, find_sites(model).chosen)
    monkeypatch.setattr(ValuesFirst, "broken", True)
    with pytest.raises(UsageError, match="does not do what it does when values are zero"):
        find_head_width(model, possible, INPUTS)
    monkeypatch.undo()
    found = find_head_width(model, possible, INPUTS)
    assert {(layer.each, layer.last) for layer in found.layers} == {(True, False)}


class ValuesFirst(type(youtu().model.layers[0].self_attn)):  # type: ignore[misc]
    broken = False
    """Whether it goes wrong when values are narrower."""

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> Any:
        made = self.kv_b_proj(kv_nope[:, 0]).unflatten(-1, (4, -1)).transpose(1, 2)
        values, keys = made[..., : self.v_head_dim], made[..., self.v_head_dim :]
        if self.broken and self.v_head_dim < 10:
            values = 2 * values
        return torch.cat([keys, k_rot.expand(-1, 4, -1, -1)], -1), values


class Normed(type(youtu().model.layers[0].self_attn)):  # type: ignore[misc]
    """Values that are normalized: not linear."""

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> Any:
        keys, values = super().expand_kv(kv_nope, k_rot)
        return keys, values / values.norm(dim=-1, keepdim=True)


class Leaking(type(youtu().model.layers[0].self_attn)):  # type: ignore[misc]
    """Values that reach the result by another way too."""

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        self.noted: list[Tensor] = []
        made, weights = super().forward(hidden_states, *args, **named)
        return made + self.noted[0].mean(), weights

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> Any:
        keys, values = super().expand_kv(kv_nope, k_rot)
        self.noted.append(values)
        return keys, values


@pytest.mark.parametrize(
    ("other", "message"),
    [(Normed, "o_proj reads is not linear in rows of .*kv_b_proj"), (Leaking, "reach the result by another way")],
)
def test_what_is_not_linear_or_goes_elsewhere_is_refused(other, message):
    model = youtu()
    model.model.layers[1].self_attn.__class__ = other
    with pytest.raises(UsageError, match=message):
        found_in(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama", "LlamaForCausalLM: no value heads of another width: config.num_attention_heads: what .* not linear"),
        ("t5", "T5ForConditionalGeneration: no value heads of another width: .* has no size of values of its own"),
        ("bert", "BertModel: no value heads of another width: config.intermediate_size: what .* not linear"),
    ],
)
def test_models_without_such_heads(name, message):
    model = BY_NAME[name].model()
    possible = possible_head_widths(model, find_sites(model).chosen)
    with pytest.raises(UsageError, match=message):
        find_head_width(model, possible, BY_NAME[name].batches(count=1)[0])


class Scaled(YoutuForCausalLM):
    """What is as wide as values without being rows or columns of a layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scales = torch.nn.Parameter(torch.ones(config.v_head_dim))


def test_other_tensors_of_that_width_are_refused():
    model = scaled(Scaled(youtu().config)).eval()
    with pytest.raises(UsageError, match=r"Scaled: .* no size of values of its own"):
        found_in(model)


def test_a_model_of_other_shapes_than_its_configuration_says_is_refused():
    model = youtu()
    model.config.intermediate_size = 40
    with pytest.raises(UsageError, match="not those that its class builds"):
        found_in(model)


def test_numbers_that_do_not_fit_their_type_are_refused():
    model = youtu().to(torch.float16)
    found = found_in(model)
    huge = {
        layer.reader: (torch.eye(10, dtype=torch.float64)[:4].expand(4, -1, -1), 1e6 * normal(32, 16), None)
        for layer in found.layers
    }
    with pytest.raises(UsageError, match="o_proj: corrected weight"):
        narrowed_model(model, found, 4, huge)
