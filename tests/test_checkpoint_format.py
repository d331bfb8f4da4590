"""A factored model through save_pretrained, from_pretrained and what people do with it afterwards."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.checkpoint import plugin
from eckart.checkpoint.description import FORMAT_VERSION, EckartConfig, attach_config, detach_config
from eckart.checkpoint.fingerprint import fingerprint
from eckart.checkpoint.load import load
from eckart.checkpoint.save import save
from eckart.errors import CheckpointError, ModelError, UsageError
from eckart.forms import build
from eckart.model import factored_modules

TOKENS = torch.arange(3, 15)[None]


def llama(tied: bool = True, **options) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied, **options)
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.BertForMaskedLM(config).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()


def factor(model: PreTrainedModel, rank: int = 8) -> PreTrainedModel:
    """Replace every untied Linear and Conv1D, low-rank and pivoted by turns."""
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    sites = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" not in tied
    ]
    for number, (name, module) in enumerate(sites):
        conv = isinstance(module, Conv1D)
        weight = module.weight.detach().T if conv else module.weight.detach()
        left, scale, right = torch.linalg.svd(weight, full_matrices=False)
        spec = {
            "form": ("lowrank", "pivoted")[number % 2],
            "in_features": weight.shape[1],
            "out_features": weight.shape[0],
            "rank": rank,
            "bias": module.bias is not None,
            "source": "conv1d" if conv else "linear",
        }
        form = build(spec)
        assert form.store(left[:, :rank] * scale[:rank], right[:rank], module.bias) is None
        model.set_submodule(name, form)
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal but for the last bits, in which products of tensors that a file places anywhere may differ."""
    return torch.allclose(first, second, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("saved") / "llama"
    model = factor(llama())
    save(model, folder)
    return folder, model


def edited(folder: Path, target: Path, config=None, tensors=None) -> Path:
    """A copy of a saved folder after editing its config and its tensors."""
    target.mkdir()
    for path in folder.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    if config is not None:
        config(content)
    if tensors is not None:
        tensors(weights)
    (target / "config.json").write_text(json.dumps(content))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


# -- what is saved comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=False), bert, gpt2])
def test_loads_bit_for_bit_and_can_be_saved_again(make, tmp_path):
    model = factor(make())
    attach_config(model)
    model.save_pretrained(tmp_path / "one")  # plain transformers, without our save
    first, info = type(model).from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info.values())
    first.save_pretrained(tmp_path / "two")
    second = load(tmp_path / "two")
    for other in (first, second):
        state = other.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert same(logits(other), logits(model))
    assert not second.training


def test_fresh_process_with_eckart_equal_and_without_refused(server, saved, tmp_path):
    folder, model = saved
    torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
import torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(folder)!r})
except RuntimeError as error:
    assert "mismatched" in str(error), error
else:
    raise SystemExit("stock transformers loaded the folder")
import eckart.checkpoint.plugin
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
with torch.no_grad():
    torch.testing.assert_close(model(torch.arange(3, 15)[None]).logits, torch.load({str(tmp_path / "logits.pt")!r}))
print("equal")
"""
    assert server.run_code(code, bare=True).splitlines()[-1] == "equal"


def test_shards_and_tied_weights_are_counted_once(tmp_path):
    model = factor(llama())
    save(model, tmp_path / "out", max_shard_size="10KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    loaded = load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert same(logits(loaded), logits(model))
    parameters = dict(model.named_parameters())
    orders = {name: value for name, value in model.named_buffers() if name.endswith("order")}
    stored = 0
    for shard in shards:
        with safe_open(shard, "pt") as file:
            stored += sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert stored == sum(value.numel() for value in (*parameters.values(), *orders.values()))


def test_bfloat16_keeps_the_order_whole(saved):
    folder, model = saved
    loaded = load(folder, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    orders = {name: buffer for name, buffer in loaded.named_buffers() if name.endswith(".order")}
    assert orders
    for name, buffer in orders.items():
        assert buffer.dtype == torch.int32
        assert torch.equal(buffer, model.get_buffer(name))
    first = loaded.model.layers[0].self_attn.q_proj.first.weight
    assert torch.equal(first, model.model.layers[0].self_attn.q_proj.first.weight.bfloat16())


def test_device_map(saved, tmp_path):
    folder, model = saved
    assert same(logits(load(folder, device_map="auto")), logits(model))
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    offloaded, info = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    assert offloaded.model.layers[1].mlp.down_proj.first.weight.is_meta
    with torch.no_grad():
        assert same(offloaded(TOKENS).logits, logits(model))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_save_with_modules_on_disk(saved, tmp_path):
    folder, model = saved
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    save(offloaded, tmp_path / "out")
    assert same(logits(load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize(("make", "head"), [(llama, AutoModelForCausalLM), (bert, AutoModelForMaskedLM)])
def test_base_model_of_a_checkpoint_with_a_head_and_the_reverse(make, head, tmp_path):
    model = factor(make())
    save(model, tmp_path / "head")
    base, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    own = {name.removeprefix(f"{model.base_model_prefix}.") for name in factored_modules(model.base_model)}
    assert set(factored_modules(base)) == own
    assert not any("encoder" in key or "layers" in key for key in (*info["missing_keys"], *info["unexpected_keys"]))
    base.save_pretrained(tmp_path / "base")
    again = head.from_pretrained(tmp_path / "base")
    for name, form in factored_modules(again.base_model).items():
        assert torch.equal(form.to_dense(), model.base_model.get_submodule(name).to_dense())


def test_config_holds_plain_specs(saved):
    folder, model = saved
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"].startswith("eckart: ")
    assert config["format_version"] == 1 <= FORMAT_VERSION  # nothing is shared
    assert config["modules"] == {name: form.spec() for name, form in factored_modules(model).items()}


def test_folders_written_with_the_bare_name_load(saved, tmp_path):
    content = json.loads((saved[0] / "config.json").read_text())["quantization_config"]
    old = edited(saved[0], tmp_path / "old", lambda config: config["quantization_config"].update(quant_method="eckart"))
    assert same(logits(load(old)), logits(saved[1]))
    load(old).save_pretrained(tmp_path / "new")
    again = json.loads((tmp_path / "new/config.json").read_text())["quantization_config"]
    assert again == content


STOCK = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError:
    assert "eckart" not in sys.modules
else:
    raise AssertionError("loaded without eckart")
"""


def test_transformers_without_eckart_says_what_to_install_before_anything_else(saved, server):
    said = server.run_code(STOCK, saved[0], bare=True)
    told = said.index("`pip install eckart`, and `import eckart`")
    assert said[:told].count("\n") <= 1  # a progress bar at most
    assert told < said.index("MISMATCH")


def test_registering_twice_does_no_harm(saved):
    plugin.register()
    plugin.register()
    assert factored_modules(load(saved[0]))


# -- what people do with it ------------------------------------------------------------------------------


def test_cast_copy_and_generate(saved):
    folder, model = saved
    loaded = load(folder)
    assert same(logits(copy.deepcopy(loaded)), logits(model))
    out = loaded.generate(TOKENS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, TOKENS.shape[1] + 4)
    assert loaded.half().dtype == torch.float16
    assert loaded.float().dtype == torch.float32


def test_pipeline(saved, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w1")
    _, model = saved
    save(model, tmp_path / "out", tokenizer=tokenizer)
    generator = transformers.pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
    text = generator("w3 w4 w5", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("w3 w4 w5")
    assert len(text.split("w")) == 1 + 6


def test_trainer_one_step(saved, tmp_path):
    loaded = load(saved[0])
    before = loaded.model.layers[0].mlp.up_proj.first.weight.detach().clone()
    trainer = transformers.Trainer(
        model=loaded,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
        ),
        train_dataset=[{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 8,
    )
    trainer.train()
    assert not torch.equal(loaded.model.layers[0].mlp.up_proj.first.weight, before)
    trainer.save_model(str(tmp_path / "trained"))
    assert same(logits(load(tmp_path / "trained")), logits(loaded.eval()))


def test_lora_on_all_linear(saved):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load(saved[0]), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert hasattr(layer.first, "lora_A")
    assert hasattr(layer.second, "lora_A")
    adapted(TOKENS, labels=TOKENS).loss.backward()
    with pytest.raises(UsageError, match=r"merge_and_unload"):
        save(adapted, "nowhere")
    merged = adapted.merge_and_unload()
    assert torch.allclose(logits(merged), logits(saved[1]), atol=1e-5)


# -- refusals --------------------------------------------------------------------------------------------


def refused(folder: Path, *words: str, error: type[Exception] = CheckpointError, **options) -> None:
    """Both from_pretrained and our own load refuse, and say where and what to do."""
    for loader in (AutoModelForCausalLM.from_pretrained, load):
        with pytest.raises(error) as caught:
            loader(folder, **options)
        for word in words:
            assert word in str(caught.value)


def test_newer_format_names_the_version(saved, tmp_path):
    def newer(config):
        config["quantization_config"] |= {"format_version": 7, "codebook": {}}

    refused(edited(saved[0], tmp_path / "new", newer), "format_version", "7", "pip install -U eckart")


@pytest.mark.parametrize("field", [{"format_version": "1"}, {"format_version": True}, {"codebook": 1}, {"modules": []}])
def test_malformed_description(field, saved, tmp_path):
    if field == {"modules": []}:
        field = {"modules": [1]}
    folder = edited(saved[0], tmp_path / "bad", lambda config: config["quantization_config"].update(field))
    refused(folder, "quantization_config", next(iter(field)), "config.json again")


@pytest.mark.parametrize(
    ("change", "word"),
    [({"form": "hologram"}, "hologram"), ({"rank": 0}, "rank"), ({"rank": "8"}, "rank"), ({"in_features": 31}, "31")],
)
def test_spec_that_cannot_be_built(change, word, saved, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    folder = edited(
        saved[0], tmp_path / "bad", lambda config: config["quantization_config"]["modules"][name].update(change)
    )
    refused(folder, name, word, "config.json")


def test_module_that_the_model_does_not_have(saved, tmp_path):
    def rename(config):
        modules = config["quantization_config"]["modules"]
        modules["model.layers.9.mlp.up_proj"] = modules.pop("model.layers.0.mlp.up_proj")

    folder = edited(saved[0], tmp_path / "bad", rename)
    refused(folder, "model.layers.9.mlp.up_proj", "LlamaForCausalLM", "config.architectures")


@pytest.mark.parametrize("key", ["mlp.up_proj.first.weight", "mlp.up_proj.second.weight", "mlp.gate_proj.order"])
def test_missing_factor_is_an_error(key, saved, tmp_path):
    name = next(n for n in load_file(saved[0] / "model.safetensors") if n.endswith(key.split(".")[-1]))
    name = f"model.layers.0.{key}" if not key.endswith("order") else name
    folder = edited(saved[0], tmp_path / "bad", tensors=lambda weights: weights.pop(name))
    refused(folder, name, "missing", "Download")


def test_load_lists_every_other_difference(saved, tmp_path):
    def change(weights):
        del weights["model.norm.weight"]
        weights["stray"] = torch.zeros(2)
        weights["model.layers.0.input_layernorm.weight"] = torch.zeros(31)

    folder = edited(saved[0], tmp_path / "bad", tensors=change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for word in ("model.norm.weight", "stray", "input_layernorm.weight (31,) instead of (32,)", "LlamaForCausalLM"):
        assert word in str(caught.value)


def test_load_with_unknown_class(saved, tmp_path):
    folder = edited(saved[0], tmp_path / "bad", lambda config: config.update(architectures=["LlamaForTelepathy"]))
    with pytest.raises(CheckpointError, match=r"LlamaForTelepathy.*auto_class"):
        load(folder)
    with pytest.raises(UsageError, match=r"os\.system.*auto_class"):
        load(folder, auto_class="os.system")
    assert factored_modules(load(folder, auto_class="AutoModelForCausalLM"))
    bare = edited(saved[0], tmp_path / "bare", lambda config: config.pop("architectures"))
    with pytest.raises(CheckpointError, match=r"config\.json.*auto_class"):
        load(bare)


def test_tied_weight_is_not_described(tmp_path):
    model = llama()
    model.lm_head = build({"form": "lowrank", "in_features": 32, "out_features": 64, "rank": 4, "bias": False})
    with pytest.raises(ModelError, match=r"lm_head.*tie_word_embeddings"):
        attach_config(model)
    untied = factor(llama(tied=False))
    save(untied, tmp_path / "untied")
    refused(
        edited(tmp_path / "untied", tmp_path / "bad", lambda config: config.update(tie_word_embeddings=True)),
        "lm_head",
        "tie_word_embeddings",
    )


def test_mark_and_unmark():
    model = llama()
    with pytest.raises(ModelError, match="no factored module"):
        attach_config(model)
    detach_config(model)
    factor(model)
    attach_config(model)
    assert isinstance(model.config.quantization_config, EckartConfig)
    with pytest.raises(ModelError, match="densify"):
        detach_config(model)
    for name, form in factored_modules(model).items():
        model.set_submodule(name, nn.Linear(form.in_features, form.out_features, bias=False))
    detach_config(model)
    assert not hasattr(model.config, "quantization_config")


# -- the hash that plans carry ---------------------------------------------------------------------------


def test_fingerprint_survives_dtypes_and_tells_models_apart():
    model = llama()
    mine = fingerprint(model)
    assert len(mine) == 64
    assert mine == fingerprint(llama())
    assert mine == fingerprint(llama().bfloat16())
    assert mine == fingerprint(llama().half())
    assert mine != fingerprint(llama(tied=False))
    assert mine != fingerprint(model.model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    assert mine != fingerprint(model)
