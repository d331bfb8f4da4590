"""Remote code: folders that load in a process without eckart, and compute what the checkpoint computes."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import BY_NAME, scaled
from mixed_forms import ATTENTION, GATED, mixed_llama, put_form, remove_head, slice_neurons
from safetensors.torch import load_file, save_file
from tiny import DEMO, llama
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import eckart
from eckart.checkpoint.description import attach_config
from eckart.checkpoint.save import save
from eckart.errors import CheckpointError, ModelError
from eckart.exports.base import ExportSource
from eckart.exports.pipeline import export
from eckart.exports.remote_code import compare, write_text
from eckart.exports.remote_code.compare import READER, TOLERANCE, probe_inputs
from eckart.exports.remote_code.exporter import RemoteCode
from eckart.exports.remote_code.folder import write_model
from eckart.exports.remote_code.parallel import plan_parallel
from eckart.model import PrunedHeads, share_parameters

EXACT = 1e-5  # of the norm, in float32


def compressed(name: str, form: str, keep: float = 0.6, **options: Any) -> PreTrainedModel:
    return eckart.compress(BY_NAME[name].model(), method="svd", keep=keep, form=form, **options).model


def headless_llama() -> PreTrainedModel:
    model = llama(num_hidden_layers=2, head_dim=8)
    remove_head(model, "model.layers.1")
    attach_config(model)
    return model.eval()


def headless_gpt2() -> PreTrainedModel:
    model = BY_NAME["gpt2"].model()
    attention = model.transformer.h[0].attn
    numbers = {"num_heads": 3, "split_size": 24}
    PrunedHeads(4, (0, 2, 3), {"c_attn": (8, 8, 8)}, {"c_proj": 8}, numbers).apply(attention)
    attach_config(model)
    return model


def sliced_llama() -> PreTrainedModel:
    model = llama(num_hidden_layers=2)
    for layer, kept in (("model.layers.0", 20), ("model.layers.1", 31)):
        slice_neurons(model, layer, kept)
    attach_config(model)
    return model.eval()


def tied_layers() -> PreTrainedModel:
    """The linear layers and the norm of one block are those of another."""
    model = llama(num_hidden_layers=2)
    names = [f"{name}.weight" for name in (*ATTENTION, "self_attn.o_proj", "input_layernorm")]
    share_parameters(model, {f"model.layers.1.{name}": f"model.layers.0.{name}" for name in names})
    attach_config(model)
    return model.eval()


MODELS = {
    "lowrank": lambda: compressed("llama", "lowrank"),
    "pivoted": lambda: compressed("llama", "pivoted"),
    "joint": lambda: compressed("llama", "joint"),
    "sliced": sliced_llama,
    "mixed": lambda: mixed_llama(llama(num_hidden_layers=8, hidden_size=64, intermediate_size=96)).eval(),
    "gpt2": lambda: compressed("gpt2", "pivoted"),
    "gpt2-sliced": lambda: compressed("gpt2", "sliced"),
    "classifier": lambda: compressed("bert-classes", "pivoted"),
    "kronecker": lambda: compressed("bert", "kronecker"),
    "tied": lambda: compressed("llama-tied", "lowrank", embeddings="lowrank", embeddings_keep=0.5),
    "masked": lambda: compressed("bert-mlm", "joint", embeddings="kronecker", embeddings_keep=0.5),
    "safe": lambda: compressed("llama", "lowrank", embeddings="safe", embeddings_keep=0.5),
    "t5": lambda: compressed("t5", "joint", embeddings="lowrank", embeddings_keep=0.5),
    "experts": lambda: compressed("mixtral", "lowrank"),
    "heads": headless_llama,
    "heads-gpt2": headless_gpt2,
    "twice": tied_layers,
    "image": lambda: compressed("vit", "lowrank"),
}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: make() for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def written(models, tmp_path_factory) -> dict[str, Any]:
    """Name -> what was written, in FOLDER / name."""
    folder = tmp_path_factory.mktemp("remote")
    found = {}
    for name, model in models.items():
        (folder / name).mkdir()
        found[name] = SimpleNamespace(folder=folder / name, **vars(write_model(model, folder / name)))
    return found


def outputs(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return next(part for part in model(**inputs).to_tuple() if torch.is_floating_point(part))


def test_all_folders_load_in_one_process_without_eckart(models, written, server, tmp_path):
    jobs = []
    for name, one in written.items():
        save_file(probe_inputs(models[name]), tmp_path / f"{name}-in")
        files = {"inputs": str(tmp_path / f"{name}-in"), "outputs": str(tmp_path / f"{name}-out")}
        jobs.append({"folder": str(one.folder), "classes": one.auto_classes, **files})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    server.run_code(READER, tmp_path / "jobs.json", bare=True)
    for name, one in written.items():
        found, inputs = load_file(tmp_path / f"{name}-out"), load_file(tmp_path / f"{name}-in")
        wanted = {one.auto_classes[0]: models[name], **dict.fromkeys(one.auto_classes[1:], models[name].base_model)}
        assert set(found) == set(wanted)
        for auto, model in wanted.items():
            expected = outputs(model, inputs)
            assert (found[auto] - expected).norm() <= EXACT * expected.norm(), (name, auto)


def test_the_file_is_alone_and_the_configuration_ordinary(written):
    for name, one in written.items():
        (file,) = one.folder.glob("*.py")
        text = file.read_text()
        assert text.startswith('# Licensed under the Apache License, Version 2.0 (the "License");')
        imported = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert imported - {"copy"} == {"torch", "transformers"}, name
        assert max(map(len, text.splitlines())) <= 120
        config = json.loads((one.folder / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["auto_map"].keys() >= {"AutoConfig", *one.auto_classes}
        assert config["model_type"].startswith("factored_")
        forms = {entry["form"] for entry in config["factored_modules"].values()}
        forms |= {entry["form"] for entry in config.get("factored_head_modules", {}).values()}
        said = {made for form, made in write_text.CLASSES.items() if f'"{form}": {made}' in text}
        assert said == {write_text.CLASSES[form] for form in forms}, name


def test_no_number_is_stored_twice(models, written):
    for name in ("mixed", "joint", "twice", "tied"):
        stored = load_file(written[name].folder / "model.safetensors").values()
        alone = sum(parameter.numel() for parameter in models[name].parameters())
        assert sum(tensor.numel() for tensor in stored if tensor.is_floating_point()) == alone, name


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    torch.manual_seed(0)
    model = llama(num_hidden_layers=2).to(torch.bfloat16)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    save(eckart.compress(model, tokenizer, method="svd", keep=0.6, form="joint").model, folder, tokenizer=tokenizer)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/original\n---\n")
    return folder


AS_USERS_DO = """
import sys
sys.modules["eckart"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
folder = sys.argv[1]
assert AutoTokenizer.from_pretrained(folder)("good day").input_ids
assert GenerationConfig.from_pretrained(folder).temperature == 0.5
said = pipeline("text-generation", folder, trust_remote_code=True)("The day", max_new_tokens=3, do_sample=False)
assert said[0]["generated_text"].startswith("The day"), said
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("loaded without the code")
again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
again.save_pretrained(sys.argv[2])
third = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
ids = torch.arange(9)[None]
assert torch.equal(third(ids).logits, again(ids).logits)
"""


def test_export_publishes_what_users_load(checkpoint, server, tmp_path):
    published = export(checkpoint, tmp_path / "out", format="remote-code")
    record = json.loads((published / "eckart" / "export.json").read_text())
    assert record["format"] == "remote-code"
    assert record["class"] == "FactoredLlamaForCausalLM"
    assert set(record["compared"]) == {"AutoModelForCausalLM", "AutoModel"}
    assert all(difference <= record["tolerance"] for difference in record["compared"].values())
    server.run_code(AS_USERS_DO, published, tmp_path / "again", bare=True)
    card = (published / "README.md").read_text()
    assert "license: mit" in card
    assert 'AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)' in card
    assert "vllm serve out --trust-remote-code" in card
    assert "--tensor-parallel-size" in card
    assert not list(published.rglob("__pycache__"))


def run_in_fork(server, folder: Path):
    """In place of a fresh process, a fork of one that never imported eckart."""

    folder.mkdir()

    def read(home: Path, classes: list[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        save_file(dict(inputs), folder / "inputs")
        job = {
            "folder": str(home),
            "classes": classes,
            "inputs": str(folder / "inputs"),
            "outputs": str(folder / "out"),
        }
        (folder / "jobs.json").write_text(json.dumps([job]))
        server.run_code(READER, folder / "jobs.json", bare=True)
        return load_file(folder / "out")

    return read


def test_nothing_is_published_that_computes_something_else(checkpoint, server, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "read_without_eckart", run_in_fork(server, tmp_path / "fork"))
    text = write_text.TEMPLATE.read_text()
    assert text.count("return self.output_factor(self.holder[0].share(x, self.place))") == 1
    wrong = tmp_path / "wrong.jinja"
    wrong.write_text(text.replace("self.holder[0].share(x, self.place)", "1.1 * self.holder[0].share(x, self.place)"))
    monkeypatch.setattr(write_text, "TEMPLATE", wrong)
    with pytest.raises(CheckpointError, match=r"not the model: the outputs of AutoModelForCausalLM differ"):
        export(checkpoint, tmp_path / "out", format="remote-code")
    assert not (tmp_path / "out").exists()


def test_a_file_that_needs_eckart_does_not_load(models, server, tmp_path):
    (tmp_path / "f").mkdir()
    one = write_model(models["lowrank"], tmp_path / "f")
    (file,) = (tmp_path / "f").glob("*.py")
    file.write_text(file.read_text().replace("import torch\n", "import torch\nimport eckart\n", 1))
    files = {"inputs": str(tmp_path / "in"), "outputs": str(tmp_path / "out")}
    save_file(probe_inputs(models["lowrank"]), files["inputs"])
    (tmp_path / "jobs.json").write_text(
        json.dumps([{"folder": str(tmp_path / "f"), "classes": one.auto_classes, **files}])
    )
    done = server.wait(server.start_code(READER, tmp_path / "jobs.json", bare=True), bare=True)
    assert done.code != 0
    assert "eckart" in done.message


def test_a_folder_that_does_not_load_is_not_published(models, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "READER", "import sys; sys.exit(f'no {sys.argv[1][-9:]}')")
    with pytest.raises(
        CheckpointError, match=r"(?s)cannot be loaded without eckart; nothing was published.*no jobs.json"
    ):
        compare.compare(models["lowrank"], tmp_path, ["AutoModelForCausalLM"])


def test_refusals(models, tmp_path):
    def source(model: PreTrainedModel) -> ExportSource:
        return ExportSource(model, tmp_path, None, False, "out")

    class OwnLlama(LlamaForCausalLM):
        """Of no module of transformers."""

    own = OwnLlama(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                               num_attention_heads=1))  # fmt: skip
    put_form(own, ["model.layers.0.mlp.up_proj"], "lowrank")
    attach_config(own)
    with pytest.raises(ModelError, match=r"OwnLlama is not a class of transformers .* --format dense"):
        RemoteCode().check(source(own), None)
    with pytest.raises(ModelError, match="loads without eckart as it is"):
        RemoteCode().check(source(BY_NAME["llama"].model()), None)
    with pytest.raises(ModelError, match="reads input_values"):
        probe_inputs(SimpleNamespace(main_input_name="input_values"))  # type: ignore[arg-type]


def test_factors_in_eight_bits_load_with_torchao_alone(server, tmp_path):
    model = MODELS["tied"]()
    inputs = probe_inputs(model)
    wanted = outputs(model, inputs)
    (tmp_path / "f").mkdir()
    one = write_model(model, tmp_path / "f", "int8")
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    found = run_in_fork(server, tmp_path / "fork")(tmp_path / "f", one.auto_classes[:1], inputs)[one.auto_classes[0]]
    assert (found - outputs(one.rounded.model, inputs)).norm() <= EXACT * wanted.norm()
    assert EXACT * wanted.norm() < (found - wanted).norm() <= 0.05 * wanted.norm()
    assert one.rounded.record["left"]["part of an embedding"] == 1
    assert one.rounded.record["quantized_layers"] == 2 * 2 * 7  # two factors of seven weights in two layers
    plain = type(one.rounded.model.model.embed_tokens.expand.weight)
    assert plain is nn.Parameter  # which the tied head reads


# -- one product for all that read an input ------------------------------------------------------------


@pytest.fixture(scope="module")
def generated(written) -> Iterator[Any]:
    """The generated file of the model with every form."""
    (file,) = written["mixed"].folder.glob("*.py")
    spec = importlib.util.spec_from_file_location("generated_for_tests", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def trio(generated) -> list[nn.Module]:
    """Three weights of one input, and how often their product was computed in `trio[0].times`."""
    torch.manual_seed(0)
    first = generated.JointLinear(6, 5, 3, True, 0, 3)
    members = [first, *(generated.JointLinear(6, 4, 3, False, place, 3, of=first) for place in (1, 2))]
    first.times = []
    first.input_factor.register_forward_hook(lambda *_: first.times.append(1))
    return members


def test_a_product_is_computed_once(trio):
    x = torch.randn(2, 6)
    for order in ((0, 1, 2), (2, 0, 1)):
        trio[0].times.clear()
        for place in order:
            assert torch.equal(trio[place](x), trio[place].output_factor(x @ trio[0].input_factor.weight.mT))
        assert len(trio[0].times) == 1
        assert trio[0].kept is None  # nothing stays in memory
    assert sum(name.startswith("input_factor") for member in trio for name, _ in member.named_parameters()) == 1


def test_a_product_is_computed_again_where_it_may_be_another_one(trio):
    x = torch.randn(2, 6)
    first, second, _ = trio

    def direct(member: nn.Module) -> Tensor:
        return member.output_factor(x @ first.input_factor.weight.mT)

    first(x)
    x += 1
    assert torch.equal(second(x), direct(second))
    with torch.no_grad():
        first(x)
    assert second(x).grad_fn is not None
    first(x)
    with torch.no_grad():
        first.input_factor.weight.mul_(2)
    assert torch.equal(first(x), direct(first))  # who asks twice gets it anew
    assert torch.equal(second(x.clone()), direct(second))


def test_compiled_it_is_one_graph_with_one_product(trio):
    x = torch.randn(2, 6)
    block = nn.ModuleList(trio)
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def run(x: Tensor) -> list[Tensor]:
        return [member(x) for member in block]

    trio[0].input_factor._forward_hooks.clear()
    with torch.no_grad():
        for found, wanted in zip(torch.compile(run, backend=count, fullgraph=True)(x), run(x), strict=True):
            torch.testing.assert_close(found, wanted)
    assert len(graphs) == 1
    assert sum("linear" in str(node.target) for node in graphs[0].graph.nodes) == 4
    assert trio[0].kept is None


# -- several processes ---------------------------------------------------------------------------------


def split_llama() -> PreTrainedModel:
    """One layer in each form that can be split, the last one as it was."""
    model = llama(num_hidden_layers=4, num_key_value_heads=4)
    for part in (*ATTENTION, *GATED, "self_attn.o_proj", "mlp.down_proj"):
        put_form(model, [f"model.layers.0.{part}"], "lowrank")
    for layer, form in ((1, "joint"), (2, "pivoted-joint")):
        for group in (ATTENTION, GATED):
            put_form(model, [f"model.layers.{layer}.{part}" for part in group], form)
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            put_form(model, [f"model.layers.{layer}.{part}"], "pivoted")
    attach_config(model)
    return model.eval()


IN_PROCESSES = """
import sys
sys.modules["eckart"] = None
import torch
from transformers import AutoModelForCausalLM, DistributedConfig
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, distributed_config=DistributedConfig(tp_size=2)
)
with torch.no_grad():
    logits = model(torch.arange(10)[None]).logits
split = sorted(name for name, parameter in model.named_parameters() if hasattr(parameter, "placements"))
torch.save((logits, split), sys.argv[2])
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> tuple[PreTrainedModel, Path]:
    folder, model = tmp_path_factory.mktemp("split"), split_llama()
    write_model(model, folder)
    return model, folder


def test_two_processes_compute_what_one_computes(split, server, tmp_path, free_port):
    model, folder = split
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    started = [
        server.start_code(
            IN_PROCESSES, folder, tmp_path / f"{rank}", bare=True, RANK=str(rank), LOCAL_RANK=str(rank), **common
        )
        for rank in range(2)
    ]
    for one in started:
        done = server.wait(one, bare=True)
        assert done.code == 0, done.said
    with torch.no_grad():
        wanted = model(torch.arange(10)[None]).logits
    for rank in range(2):
        logits, names = torch.load(tmp_path / f"{rank}")
        assert (logits - wanted).norm() <= EXACT * wanted.norm()
    assert "model.layers.0.self_attn.q_proj.output_factor.weight" in names
    assert "model.layers.0.self_attn.o_proj.input_factor.weight" in names
    assert "model.layers.1.self_attn.o_proj.pivots.weight" in names
    assert "model.layers.3.mlp.up_proj.whole.weight" in names
    assert not any("q_proj.input_factor" in name or "others" in name for name in names)


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_the_plan_names_one_of_two_factors(split, written):
    plan = (split[1] / "modeling_factored_llama.py").read_text()
    for line in (
        '"layers.*.self_attn.k_proj.output_factor": "colwise",',
        '"layers.*.self_attn.k_proj.whole": "colwise",',
        '"layers.*.self_attn.o_proj.input_factor": "rowwise",',
        '"layers.*.mlp.down_proj.pivots": "rowwise",',
        '"layers.*.mlp.down_proj.whole": "rowwise",',
    ):
        assert line in plan
    assert '_proj": "' not in plan  # vLLM would take it for both factors
    assert "refuse_vllm" not in plan
    assert written["sliced"].parallel.plan == LlamaConfig.base_model_tp_plan
    assert "tp_plan" not in (written["sliced"].folder / "modeling_factored_llama.py").read_text()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pivoted", "q_proj is pivoted, and its plan says colwise"),
        ("gpt2", "its class has no plan"),
        ("experts", "its experts are separate modules"),
        ("heads", "different numbers of attention heads"),
        ("safe", "needs all of them at each step"),
        ("twice", "layers are other layers once more"),
    ],
)
def test_vllm_is_refused_what_it_would_compute_wrongly(written, name, why, monkeypatch):
    (file,) = written[name].folder.glob("*.py")
    spec = importlib.util.spec_from_file_location("generated_to_refuse", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vllm, other = (
        SimpleNamespace(get_text_config=lambda name=name: SimpleNamespace(_attn_implementation=name))
        for name in ("vllm", "sdpa")
    )
    module.refuse_vllm(other)
    if name in ("pivoted", "gpt2"):
        module.refuse_vllm(vllm)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        module.refuse_vllm(other)
    with pytest.raises(NotImplementedError, match=why):
        module.refuse_vllm(vllm)
    assert written[name].parallel.plan is None or name == "safe"


def test_a_model_whose_parts_have_plans_is_not_split():
    base = nn.ModuleDict({"text": nn.Linear(2, 2)})
    found = plan_parallel(base, {"text": "colwise"}, {}, plan_of_parts=True)
    assert found.plan is None
    assert "models inside it" in found.reason
    assert plan_parallel(base, {"text": "colwise"}, {}).plan == {"text": "colwise"}


def test_half_precision_is_held_to_its_own_rounding(tmp_path, monkeypatch):
    model = scaled(LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
                                                num_hidden_layers=1, num_attention_heads=2))).eval()  # fmt: skip
    model.to(torch.bfloat16)
    wanted = outputs(model, probe_inputs(model))
    monkeypatch.setattr(compare, "read_without_eckart", lambda *_: {"AutoModelForCausalLM": wanted * 1.01})
    assert compare.compare(model, tmp_path, ["AutoModelForCausalLM"])["tolerance"] == TOLERANCE[torch.bfloat16]
    model.to(torch.float32)
    for found in (wanted.float() * 1.01, wanted.float() * torch.nan, wanted.float()[:1]):
        monkeypatch.setattr(compare, "read_without_eckart", lambda *_, found=found: {"AutoModelForCausalLM": found})
        with pytest.raises(CheckpointError, match="differ by"):
            compare.compare(model, tmp_path, ["AutoModelForCausalLM"])
