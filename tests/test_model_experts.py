"""Separate experts: the same function as fused ones, statistics of routed tokens, and checkpoints that load."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from problems import close
from safetensors.torch import load_file, save_file
from tiny import Server

import eckart
from eckart.calibration import calibrate
from eckart.data import load_data
from eckart.forms import FactoredLinear
from eckart.model import find_sites, separate_experts, with_separate_experts

SMALL = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
         "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
KINDS = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 24, "decoder_sparse_step": 1, "head_dim": 8}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "head_dim": 8}),  # transposed, interleaved, with biases
}
LOADER = """
import json, sys
import torch, transformers
import eckart
from safetensors.torch import load_file
answers = {}
for name, folder in json.loads(sys.argv[1]).items():
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    kept = load_file(f"{folder}.logits")
    with torch.no_grad():
        logits = model.eval()(kept["ids"]).logits
        dense = eckart.densify(model)(kept["ids"]).logits
    answers[name] = {
        "info": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "apart": float((logits - kept["logits"]).abs().max()),
        "dense": float((dense - logits).abs().max()),
        "fused": type(model.model.layers[0].mlp.experts).__name__,
    }
print(json.dumps(answers))
"""
STOCK = """
import json, sys
import transformers
assert "eckart" not in sys.modules
refused = {}
for name, folder in json.loads(sys.argv[1]).items():
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        refused[name] = False
    except RuntimeError:
        refused[name] = True
print(json.dumps(refused))
"""
METHODS = {"mixtral": "eckart", "qwen3-moe": "drone", "gpt-oss": "kfac"}


def drawn(name: str) -> transformers.PreTrainedModel:
    family, more = KINDS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **more)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def ids(rows: int = 6, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} for part in ids().split(2)]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(ids()).logits


@pytest.mark.parametrize("name", KINDS)
def test_separate_experts_compute_the_same_and_share_storage(name):
    model = drawn(name)
    separate = with_separate_experts(model)
    assert len(separate_experts(separate)) == 2
    assert not separate_experts(model)  # the caller's is as it was
    close(logits(separate), logits(model), 1e-5)
    fused = model.model.layers[1].mlp.experts.down_proj
    assert separate.model.layers[1].mlp.experts.each[3].down.weight.data_ptr() == fused[3].data_ptr()
    back = separate_experts(separate)["model.layers.1.mlp.experts"].fused()
    for key, value in model.model.layers[1].mlp.experts.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)


def test_experts_whose_output_would_change_stay_fused():
    model = drawn("mixtral")
    layer = model.model.layers[0].mlp.experts
    layer._apply_gate = lambda inner: inner.chunk(2, dim=-1)[0]  # not what the forward does
    layer.forward = lambda x, index, weights: x * 2
    assert list(separate_experts(with_separate_experts(model))) == ["model.layers.1.mlp.experts"]


def test_model_without_experts_is_returned_as_it_is():
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{k: v for k, v in SMALL.items() if k != "num_experts_per_tok"})
    )
    assert with_separate_experts(model) is model


@pytest.mark.parametrize("name", KINDS)
def test_statistics_of_an_expert_are_of_the_tokens_routed_to_it(name):
    model = with_separate_experts(drawn(name))
    experts = model.model.layers[1].mlp.experts
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = experts.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[:2]), with_kwargs=True
    )
    data = load_data(batches(), model=model)
    for batch in data.batches:
        with torch.no_grad():
            model(batch.inputs["input_ids"])
    handle.remove()
    sites = [site.name for site in find_sites(model).chosen]
    moments = calibrate(model, sites, data, needs=frozenset({"gram"})).moments
    total = 0
    for number in range(4):
        rows = torch.cat([x[(index == number).any(-1)] for x, index in seen]).double()
        entry = moments.get(f"model.layers.1.mlp.experts.each.{number}.up")
        assert (entry is None) == (len(rows) == 0)
        if entry is not None:
            assert entry.tokens == len(rows)
            close(entry.input_gram.double(), rows.mT @ rows / len(rows), 1e-5)
            total += len(rows)
    assert total == 2 * ids().numel()


def test_expert_that_no_token_reaches_is_reported_and_stays_dense():
    model = drawn("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[:3] *= 100
    few = [{"input_ids": ids(1, 4)}]
    result = eckart.compress(model, data=few, method="drone", keep=0.6)
    unreached = [name for name, choice in result.plan.choices.items() if choice.form == "dense" and "experts" in name]
    assert unreached
    notes = "\n".join(result.report["notes"])
    told = next(note for note in result.report["notes"] if "stay dense" in note)
    assert f"{', '.join(unreached[:8])}" in told
    assert "(no token of the calibration data reached it). Give more text (--num-samples)" in told
    assert notes.count("stay dense") == 1
    assert "sites that saw fewer tokens than they have features" in notes
    assert "model.layers." in next(note for note in result.report["notes"] if "fewer tokens" in note)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("experts")
    folders = {}
    for name in KINDS:
        model = drawn(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        result = eckart.compress(model, data=batches(), method=METHODS[name], keep=0.5)
        assert any("experts" in key for key, c in result.plan.choices.items() if c.form != "dense")
        folders[name] = home / name
        result.save_pretrained(folders[name])
        save_file({"ids": ids(), "logits": logits(result.model.eval()).contiguous()}, f"{folders[name]}.logits")
        only = eckart.compress(model, method="svd", keep=0.5, targets=["*experts*"])
        only.save_pretrained(home / f"{name}-only")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return folders


def asked(server: Server, code: str, folders: dict[str, Path], *, bare: bool = False) -> dict:
    words = json.dumps({name: str(folder) for name, folder in folders.items()})
    return json.loads(server.run_code(code, words, bare=bare).splitlines()[-1])


def test_fresh_process_loads_factored_experts_and_fuses_dense_ones(published, server):
    for name, answer in asked(server, LOADER, published).items():
        assert answer["info"] == {}, name
        assert answer["apart"] < 1e-6, name
        assert answer["dense"] < 1e-5, name
        assert answer["fused"].endswith("Experts"), name
        assert answer["fused"] != "SeparateExperts", name


def test_transformers_without_eckart_refuses_factored_experts(published, server):
    only = {name: folder.with_name(f"{name}-only") for name, folder in published.items()}
    assert all(asked(server, STOCK, only, bare=True).values())


def test_sizes_count_stored_numbers_and_multiply_adds_of_routed_experts(published):
    for name, folder in published.items():
        report = json.loads((folder / "eckart" / "report.json").read_text())
        after = report["sizes"]["model"]["after"]
        assert after["elements"] == sum(value.numel() for value in load_file(folder / "model.safetensors").values())
        model = eckart.load(folder)
        experts = model.model.layers[0].mlp.experts
        parts = [part for part in experts.modules() if isinstance(part, (FactoredLinear, torch.nn.Linear))]
        inside = {id(child) for part in parts if isinstance(part, FactoredLinear) for child in part.modules()}
        own = [part for part in parts if id(part) not in inside or isinstance(part, FactoredLinear)]
        total = sum(p.multiply_adds() if isinstance(p, FactoredLinear) else p.weight.numel() for p in own)
        assert experts.multiply_adds() == round(total * 2 / 4), name
