"""LoRA of peft by the layers' own names, on every form: trained, saved, loaded, merged into the same model."""

import copy
import json

import pytest
import torch
from joint_groups import joined
from tiny import llama
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import eckart
from eckart.checkpoint.description import attach_config
from eckart.errors import UsageError
from eckart.forms import FactoredLinear, Joint, LowRank, LowRankSparse
from eckart.model import factored_modules

pytestmark = pytest.mark.filterwarnings("ignore:adapters beside factored layers", "ignore:Already following adapters")
peft = pytest.importorskip("peft", reason="pip install 'eckart[peft]'")

IDS = {"input_ids": torch.arange(10, 40)[None]}
NAMES = ["q_proj", "v_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MADE = {
    "lowrank": {"form": "lowrank"},
    "pivoted": {"form": "pivoted"},
    "kronecker": {"form": "kronecker"},
    "sliced": {"form": "sliced"},
    "shared-basis": {"method": "basis-sharing"},
    "tied-embedding": {"form": "lowrank", "embeddings": "lowrank"},
    "tied-kronecker": {"form": "lowrank", "embeddings": "kronecker"},
    "embedding": {"form": "lowrank", "embeddings": "lowrank"},
}
GROUPED = {"joint", "pivoted-joint"}


@pytest.fixture(scope="module")
def models():
    """Form -> a model of it; each test takes a copy."""
    torch.manual_seed(0)
    data = [{"input_ids": torch.randint(0, 512, (2, 24))} for _ in range(8)]
    small = {"vocab_size": 512, "num_hidden_layers": 2, "intermediate_size": 64}
    made = {
        name: eckart.compress(llama(tie_word_embeddings=name.startswith("tied"), **small), data=data, keep=0.5, **how)
        .model.eval()
        for name, how in MADE.items()
    }  # fmt: skip
    for name in GROUPED:
        made[name] = joined("llama", group_form=name)[0]
        attach_config(made[name])
    return made


def config(targets, **more):
    return peft.LoraConfig(**{"r": 2, "target_modules": targets, "init_lora_weights": False} | more)


def adapted(model, targets, **more):
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(model), config(targets, **more)).eval()


def logits(model, **more):
    with torch.no_grad():
        return model(**IDS, **more).logits


def close(one, other, tolerance=1e-4):
    assert float((one - other).abs().max()) < tolerance


@pytest.mark.parametrize("targets", [NAMES, None, EVERY, "all-linear"], ids=["names", "default", "every", "all-linear"])
@pytest.mark.parametrize("form", [name for name in (*MADE, *sorted(GROUPED)) if name != "embedding"])
def test_merging_gives_the_same_model_here_and_saved(models, form, targets, tmp_path):
    with_adapters = adapted(models[form], targets)
    before = logits(models[form])
    expected = logits(with_adapters)
    assert float((expected - before).abs().max()) > 0.1
    with with_adapters.disable_adapter():
        close(logits(with_adapters), before)
    with_adapters.merge_adapter()
    close(logits(with_adapters), expected)
    with_adapters.unmerge_adapter()
    close(logits(with_adapters), expected)
    merged = with_adapters.merge_and_unload()
    close(logits(merged), expected)
    merged.save_pretrained(tmp_path)  # by transformers alone
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("form", ["lowrank", "joint", "pivoted-joint"])
def test_adapter_beside_the_layer_is_that_of_the_dense_model(models, form, tmp_path):
    """Names and shapes: what is trained here fits the dense model, and what was trained there fits here."""
    with_adapters = adapted(models[form], NAMES)
    with_adapters.save_pretrained(tmp_path / "adapter")
    compressed = models[form].save_pretrained(tmp_path / "model") or AutoModelForCausalLM.from_pretrained(
        tmp_path / "model"
    )
    back = peft.PeftModel.from_pretrained(compressed, tmp_path / "adapter").eval()
    close(logits(back), logits(with_adapters), 1e-5)
    close(logits(back.merge_and_unload()), logits(with_adapters))
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    native.load_adapter(str(tmp_path / "adapter"))  # as transformers itself does it
    close(logits(native), logits(with_adapters), 1e-5)
    dense = eckart.densify(copy.deepcopy(models[form]))
    close(logits(peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()), logits(with_adapters))


def test_adapters_are_trained_and_the_factors_are_not(models):
    model = adapted(models["joint"], None, init_lora_weights=True)
    close(logits(model), logits(models["joint"]), 1e-6)  # B is zero
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(**IDS, labels=IDS["input_ids"]).loss.backward()
        optimizer.step()
    assert all(float(p.grad.abs().max()) > 0 for name, p in model.named_parameters() if "lora_" in name)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert float((logits(model) - logits(models["joint"])).abs().max()) > 1e-3


def test_merged_layer_has_the_rank_of_both_or_is_dense_where_that_is_smaller(models):
    before = factored_modules(models["lowrank"])
    merged = adapted(models["lowrank"], NAMES).merge_and_unload()
    for name, form in factored_modules(merged).items():
        grown = 2 if name.endswith(("q_proj", "v_proj")) else 0
        assert form.rank == before[name].rank + grown
    described = merged.config.quantization_config.to_dict()["modules"]
    assert described["model.layers.0.self_attn.q_proj"]["rank"] == before["model.layers.0.self_attn.q_proj"].rank + 2
    large = adapted(models["lowrank"], NAMES, r=12).merge_and_unload()
    assert type(large.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert "model.layers.0.self_attn.q_proj" not in large.config.quantization_config.to_dict()["modules"]


def test_layer_that_leaves_a_group_leaves_the_others_together(models, tmp_path):
    """q_proj holds the parameter by whose name the file knows the group."""
    merged = adapted(models["joint"], ["q_proj"]).merge_and_unload()
    attention = merged.model.layers[0].self_attn
    assert attention.k_proj.first.weight is attention.v_proj.first.weight
    assert not isinstance(attention.q_proj, Joint)
    merged.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(logits(back), logits(merged), 1e-5)
    attention = back.model.layers[0].self_attn
    assert isinstance(attention.k_proj, Joint)
    assert attention.k_proj.first.weight is attention.v_proj.first.weight


def test_description_of_a_copy_is_its_own(models):
    copied = copy.deepcopy(models["lowrank"])
    eckart.densify(copied)
    assert len(models["lowrank"].config.quantization_config.to_dict()["modules"]) == len(
        factored_modules(models["lowrank"])
    )


def test_adapters_on_shared_factors_are_merged_into_copies(models, tmp_path):
    model = adapted(models["shared-basis"], ["first"])
    expected = logits(model)
    first, second = (layer.self_attn.q_proj.first for layer in model.base_model.model.model.layers)
    model.merge_adapter()
    close(logits(model), expected)
    model.unmerge_adapter()
    assert first.base_layer.weight is second.base_layer.weight
    merged = model.merge_and_unload()
    close(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_all_linear_leaves_shared_factors_and_embeddings_alone(models):
    """What `merge_and_unload` gives keeps its size, as of a dense model."""
    for form in ("shared-basis", "joint", "tied-embedding"):
        size = sum(parameter.numel() for parameter in models[form].parameters())
        merged = adapted(models[form], "all-linear").merge_and_unload()
        assert sum(parameter.numel() for parameter in merged.parameters()) == size
    names = [name for name, _ in adapted(models["embedding"], "all-linear").named_parameters() if "lora_" in name]
    assert names
    assert not any("embed_tokens" in name or "lm_head" in name for name in names)


def test_what_cannot_be_merged_is_refused_with_the_way_out(models):
    tied = adapted(models["tied-embedding"], ["embed_tokens.expand"])
    with pytest.raises(UsageError, match=r"exclude_modules=\['expand'\]"):
        tied.merge_adapter()
    head = adapted(models["tied-embedding"], ["lm_head"])
    assert float((logits(head) - logits(models["tied-embedding"])).abs().max()) > 0.1
    with pytest.raises(UsageError, match=r"tied to factored embeddings.*densify"):
        head.merge_and_unload()
    close(logits(head.unload()), logits(models["tied-embedding"]), 1e-6)


def test_quantized_layers_are_adapted_and_not_merged():
    pytest.importorskip("torchao", reason="pip install 'eckart[quant]'")
    wide = llama(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    rounded = eckart.compress(wide, method="svd", form="lowrank", keep=0.5, quantize="int8").model
    model = adapted(rounded, NAMES)
    assert float((logits(model) - logits(rounded)).abs().max()) > 0.1
    model(**IDS, labels=IDS["input_ids"]).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for name, p in model.named_parameters() if "lora_" in name)
    with pytest.raises(UsageError, match=r"is quantized.*merge it there, and quantize the result"):
        model.merge_adapter()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_variants_that_need_the_dense_weight_are_refused(models, options):
    with pytest.raises(UsageError, match=r"(use_dora|pissa).*all-linear.*densify"):
        adapted(models["lowrank"], NAMES, **options)


def test_several_adapters(models):
    model = adapted(models["pivoted"], NAMES)
    one = logits(model)
    torch.manual_seed(2)
    model.add_adapter("other", config(["q_proj"], lora_alpha=16))
    model.set_adapter("other")
    two = logits(model)
    assert float((one - two).abs().max()) > 0.1
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    close(logits(model), both)
    model.unmerge_adapter()
    model.set_adapter("default")
    close(logits(model), one)
    close(logits(model.merge_and_unload(adapter_names=["other"])), two)


def test_conv1d_and_biases():
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=48, n_embd=32, n_layer=1, n_head=4)).eval()
    for parameter in gpt2.parameters():
        parameter.data.normal_(0, 0.3)
    for form in ("lowrank", "pivoted", "kronecker"):
        model = eckart.compress(gpt2, method="svd", form=form, keep=0.4).model
        with_adapters = adapted(model, None, lora_bias="bias" in form)  # c_attn
        expected = logits(with_adapters)
        assert float((expected - logits(model)).abs().max()) > 0.1
        close(logits(with_adapters.merge_and_unload(safe_merge=True)), expected)
    model = eckart.compress(gpt2, method="svd", form="lowrank", keep=0.4).model
    biased = adapted(model, ["c_attn"], lora_bias=True)
    expected = logits(biased)
    close(logits(biased.merge_and_unload()), expected)


def test_classifier_by_defaults():
    torch.manual_seed(0)
    options = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = BertForSequenceClassification(BertConfig(**options, intermediate_size=64)).eval()
    model = eckart.compress(bert, method="svd", form="lowrank", keep=0.5).model
    with_adapters = adapted(model, None, task_type="SEQ_CLS")
    assert isinstance(with_adapters.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer, LowRank)
    expected = logits(with_adapters)
    close(logits(with_adapters.merge_and_unload()), expected)


def test_low_rank_and_sparse_keeps_its_sparse_rows():
    torch.manual_seed(0)
    model = llama(num_hidden_layers=1, vocab_size=512, intermediate_size=64).eval()
    layer = LowRankSparse(32, 64, 4, 5, bias=False)
    places = torch.tensor([3, 9, 20, 40, 63])
    layer.store_sparse(torch.randn(64, 4), torch.randn(4, 32), torch.randn(5, 32), places, None)
    model.model.layers[0].mlp.up_proj = layer
    with_adapters = adapted(model, ["up_proj"])
    expected = logits(with_adapters)
    merged = with_adapters.merge_and_unload()
    close(logits(merged), expected)
    found = merged.model.layers[0].mlp.up_proj
    assert (type(found), found.rank, found.rows) == (LowRankSparse, 6, 5)


def test_broken_adapter_is_refused_when_asked(models):
    model = adapted(models["lowrank"], NAMES)
    next(p for name, p in model.named_parameters() if "lora_A" in name).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="broken"):
        model.merge_adapter(safe_merge=True)


def test_weight_and_bias_of_a_form_are_not_set(models):
    layer = models["lowrank"].model.layers[0].self_attn.q_proj
    assert isinstance(layer, FactoredLinear)
    layer.weight = layer.weight  # as peft does when it takes an adapter off
    layer.bias = layer.bias
    with pytest.raises(AttributeError, match="made of its factors"):
        layer.weight = torch.nn.Parameter(torch.zeros(32, 32))
    with pytest.raises(AttributeError, match="made of its factors"):
        layer.bias = torch.zeros(32)


def test_description_is_json_while_adapters_are_on(models):
    model = adapted(models["joint"], NAMES)
    said = model.base_model.model.config.quantization_config.to_dict()
    assert json.loads(json.dumps(said)) == said
    assert not any("base_layer" in name for name in said["modules"])
