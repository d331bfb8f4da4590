"""eckart.narrow_value_heads: a smaller model of the same class, near to the original, with an honest account."""

import json
from typing import Any

import pytest
import torch
from architectures import BY_NAME, output
from problems import close, normal
from safetensors.torch import save_file
from test_compression_sliced import STOCK
from test_model_value_heads import INPUTS, VOCABULARY, deepseek, mimo, youtu

import eckart
from eckart.compression import narrow_values
from eckart.errors import ModelError, UsageError
from eckart.model import dense_weight


def batches(count: int = 6) -> list[dict[str, Any]]:
    stream = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(4, VOCABULARY, (8, 16), generator=stream)} for _ in range(count)]


@pytest.mark.parametrize("make", [youtu, deepseek, mimo])
def test_it_is_smaller_and_near(make):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    width = model.config.v_head_dim
    plain = output(model, INPUTS)
    apart = []
    for now in (width - 1, width // 2):
        made = eckart.narrow_value_heads(model, data=batches(), width=now)
        assert type(made.model) is type(model)
        assert (made.key, made.before, made.width, made.model.config.v_head_dim) == ("v_head_dim", width, now, now)
        readers = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
        assert list(made.lost) == readers
        for name in readers:
            reader, curve = made.model.get_submodule(name), made.curves[name]
            assert (tuple(reader.weight.shape), reader.in_features) == ((32, 4 * now), 4 * now)
            assert len(curve) == width + 1
            assert (float(curve[0]), float(curve[-1])) == (1, 0)
            assert made.lost[name] == float(curve[now]) > 0
        built = type(model)(made.model.config)  # what its class stores
        shapes = {name: tensor.shape for name, tensor in made.model.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in built.state_dict().items()}
        apart.append(float((output(made.model, INPUTS) - plain).norm() / plain.norm()))
    assert apart[0] < apart[1] < 0.5
    assert model.config.v_head_dim == width
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_metrics_and_joint_directions_are_worth_something():
    model = youtu()
    with torch.no_grad():
        for block in model.model.layers:  # values and what reads them prefer other directions
            spread = torch.logspace(0, -2, 10)
            rows = block.self_attn.kv_b_proj.weight.unflatten(0, (4, 16))[:, 6:]
            rows *= 4 * spread[None, :, None]
            block.self_attn.o_proj.weight.unflatten(1, (4, 10)).mul_(torch.logspace(-1.5, 0, 10))
    data = batches()
    inputs = batches(9)[-1]
    plain = output(model, inputs)
    apart = {}
    for method in ("svd", "drone", "eckart"):
        made = eckart.narrow_value_heads(model, data=data, width=4, method=method)
        apart[method] = float((output(made.model, inputs) - plain).norm())
        assert not made.notes
    assert apart["drone"] < 0.7 * apart["svd"]
    assert apart["eckart"] < 0.85 * apart["svd"]


def test_without_data_the_weights_decide():
    model = youtu()
    made = eckart.narrow_value_heads(model, width=6, method="svd")
    name = "model.layers.0.self_attn.o_proj"
    weight = dense_weight(model.get_submodule(name)).double().unflatten(1, (4, 10))
    tails = torch.linalg.svdvals(weight.transpose(0, 1))[:, 6:].square().sum()
    assert made.lost[name] == pytest.approx(float(tails / weight.square().sum()), rel=1e-6)


def test_biases_take_up_the_means():
    model = youtu(attention_bias=True)
    for block in model.model.layers:
        block.self_attn.kv_b_proj.bias = torch.nn.Parameter(3 * normal(64, dtype=torch.float32))
    plain = output(model, INPUTS)
    model_type = type(model)

    class WithBias(model_type):  # type: ignore[misc, valid-type]
        """Builds that bias too."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for block in self.model.layers:
                made = block.self_attn.kv_b_proj
                made.bias = torch.nn.Parameter(torch.zeros(made.out_features))

    model.__class__ = WithBias
    centered = eckart.narrow_value_heads(model, data=batches(), width=5)
    other = eckart.narrow_value_heads(model, data=batches(), width=5, method="drone")
    apart = [float((output(one.model, INPUTS) - plain).norm()) for one in (centered, other)]
    assert apart[0] < apart[1]
    for i in range(2):
        name = f"model.layers.{i}.self_attn."
        assert centered.model.get_submodule(f"{name}kv_b_proj").bias.shape == (44,)
        old = model.get_submodule(f"{name}o_proj").bias
        assert float((centered.model.get_submodule(f"{name}o_proj").bias - old).detach().abs().max()) > 1e-3
        assert torch.equal(other.model.get_submodule(f"{name}o_proj").bias, old)


def test_transformers_alone_loads_it_and_eckart_goes_on(server, tmp_path):
    made = eckart.narrow_value_heads(youtu(), data=batches(), width=5)
    folder, file = tmp_path / "out", tmp_path / "inputs"
    made.model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["v_head_dim"] == 5
    save_file(INPUTS, file)
    save_file({"logits": output(made.model, INPUTS).contiguous()}, f"{file}.expected")
    jobs = {"youtu": (str(folder), "AutoModelForCausalLM", str(file))}
    apart, info = json.loads(server.run_code(STOCK, json.dumps(jobs), bare=True).strip().splitlines()[-1])["youtu"]
    assert not info
    assert apart < 1e-5
    again = eckart.narrow_value_heads(folder, data=batches(), width=4)
    assert again.before == 5
    result = eckart.compress(again.model, data=batches(), form="sliced", stock=True, keep=0.9, refit=False)
    assert result.model.config.v_head_dim == 4
    assert result.model.config.intermediate_size < 48


def test_generation_with_a_cache():
    made = eckart.narrow_value_heads(youtu(), data=batches(), width=5).model
    kept = [
        made.generate(**INPUTS, max_new_tokens=6, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    ]
    assert torch.equal(*kept)


def test_what_cannot_be_is_refused(monkeypatch):
    model = youtu()
    for width in (0, 10, 11):
        with pytest.raises(UsageError, match=rf"width={width}: .* 10 numbers \(config.v_head_dim\).* at most 9"):
            eckart.narrow_value_heads(model, data=batches(), width=width)
    with pytest.raises(UsageError, match=r"keep is no option of it\. It takes batch_size"):
        eckart.narrow_value_heads(model, data=batches(), width=4, keep=0.5)
    with pytest.raises(UsageError, match="no value heads of another width"):
        eckart.narrow_value_heads(BY_NAME["llama"].model(), data=BY_NAME["llama"].batches(), width=4)
    model_of_images = BY_NAME["vit"].model()
    monkeypatch.setattr("eckart.compression.narrow_values.dummy_inputs", lambda _: {})
    with pytest.raises(UsageError, match=r"ViT.*: no small pass runs through it"):
        eckart.narrow_value_heads(model_of_images, data=BY_NAME["vit"].batches(), width=4)
    compressed = eckart.compress(model, method="svd").model
    with pytest.raises(ModelError, match="already factored"):
        eckart.narrow_value_heads(compressed, data=batches(), width=4)


def test_what_no_token_reaches_goes_by_its_weights(monkeypatch):
    monkeypatch.setattr(narrow_values, "why_useless", lambda moments: "nothing reached it")
    model = youtu()
    made = eckart.narrow_value_heads(model, data=batches(2), width=4)
    assert made.notes == tuple(
        f"model.layers.{i}.self_attn.o_proj: nothing reached it; its value heads were narrowed by its weights alone"
        for i in range(2)
    )
    weights = eckart.narrow_value_heads(model, width=4, method="svd")
    close(output(made.model, INPUTS), output(weights.model, INPUTS), 1e-6)
