"""Models whose numbers lie in files: what they compute, and the memory that they take."""

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
import transformers
from architectures import BY_NAME, output
from problems import RANK_FORMS
from safetensors import safe_open
from torch import nn

from eckart.checkpoint import mapped
from eckart.checkpoint.load import load
from eckart.checkpoint.mapped import is_mapped, load_mapped, spool
from eckart.checkpoint.save import save
from eckart.checkpoint.stored import stored_tensors
from eckart.errors import CheckpointError
from eckart.forms import FORMS
from eckart.model import cast, replace_module, shared_clone, unshare_storage

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what is mapped")

# What every measurement begins with; RssAnon is what no file backs.
MEASURE = """
    import sys, threading, time
    from pathlib import Path

    import torch

    torch.set_num_threads(1)
    from eckart.checkpoint.load import load
    from eckart.checkpoint.mapped import load_mapped
    from eckart.checkpoint.save import save
    from eckart.model import ComputePlacement, WeightLoader, shared_clone

    folder = Path(sys.argv[1])

    def anonymous():
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def growth(work):
        before, found, done = anonymous(), [], threading.Event()

        def sample():
            while not done.is_set():
                found.append(anonymous() - before)
                time.sleep(0.0005)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            result = work()
        finally:
            done.set()
            thread.join()
        return result, max(found)
"""
LLAMA = {
    "vocab_size": 4000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "tie_word_embeddings": True,
}
MIXTRAL = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
}


def run(script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    code = textwrap.dedent(MEASURE) + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def made(family, options, dtype, folder):
    """A model stored in float32 whose config names another type; returns its bytes in that."""
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**options))
    model.save_pretrained(folder, max_shard_size="30MB")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32"', f'"dtype": "{dtype}"'))
    return sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize


def larger(model):
    return [p for p in model.parameters() if p.numel() * p.element_size() > mapped.SMALL]


def test_memory_of_loading_copying_computing_and_saving(tmp_path):
    """Of one model that is stored in another type, and of one whose experts are fused."""
    cases = {"Llama": (LLAMA, "bfloat16"), "Mixtral": (MIXTRAL, "float32")}
    sizes = {family: made(family, *case, tmp_path / family / "model") for family, case in cases.items()}
    BY_NAME["llama"].model().save_pretrained(tmp_path / "tiny")
    measured = run(
        """
        import json
        load(folder / "tiny")  # what is imported on the way

        def measure(folder):
            model, loading = growth(lambda: load_mapped(folder / "model", scratch=folder / "scratch"))
            clone, cloning = growth(lambda: shared_clone(model))
            weights = WeightLoader(clone, ComputePlacement(torch.device("cpu"), torch.float32))
            blocks = [f"model.layers.{i}" for i in range(len(clone.model.layers))]
            with torch.no_grad(), weights.streaming(blocks):
                _, computing = growth(lambda: clone(torch.arange(8)[None], use_cache=False))
            _, saving = growth(lambda: save(clone, folder / "again", max_shard_size="10MB"))
            found = {"loading": loading, "cloning": cloning, "computing": computing, "saving": saving}
            return found | {"dtype": str(model.dtype)}

        print(json.dumps({family: measure(folder / family) for family in sys.argv[2:]}))
        """,
        tmp_path,
        *cases,
    )
    for family, found in measured.items():
        folder, dtype, size = tmp_path / family, cases[family][1], sizes[family]
        assert found["dtype"] == f"torch.{dtype}"
        assert found["loading"] < 0.2 * size, found
        assert found["cloning"] < 0.05 * size, found
        assert found["saving"] < 0.3 * size, found
        model, plain = load_mapped(folder / "model", scratch=folder / "scratch"), load(folder / "model")
        # In float32: a block, or the head, and a few megabytes of whatever computing takes.
        block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4 if dtype == "bfloat16" else 0
        assert found["computing"] < block + 12e6, found
        assert larger(model)
        assert all(is_mapped(parameter) for parameter in larger(model))
        again = load(folder / "again").state_dict()
        state = model.state_dict()
        assert again.keys() == plain.state_dict().keys()
        for name, tensor in plain.state_dict().items():
            assert torch.equal(state[name], tensor), name
            assert torch.equal(again[name], tensor), name


# One of each way in which stored tensors become parameters: as they are, tied, transposed, shared by two stacks, fused.
KINDS = ("bert-mlm", "gpt2", "llama-tied", "t5", "albert", "mixtral")


@pytest.mark.parametrize("name", KINDS)
def test_a_mapped_model_is_the_loaded_one(name, tmp_path, monkeypatch):
    architecture = BY_NAME[name]
    monkeypatch.setattr(mapped, "SMALL", 0)
    before = architecture.model()
    before.save_pretrained(tmp_path / "model")
    plain = load(tmp_path / "model")
    model = load_mapped(tmp_path / "model", scratch=tmp_path / "scratch")
    assert not model.training
    assert model.config.to_dict() == plain.config.to_dict()
    assert all(is_mapped(parameter) for parameter in model.parameters())
    assert {n: (t.dtype, t.shape) for n, t in model.state_dict().items()} == {
        n: (t.dtype, t.shape) for n, t in plain.state_dict().items()
    }
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]  # ties stay ties
    inputs = architecture.batches(count=1)[0]
    torch.testing.assert_close(output(model, inputs), output(plain, inputs), rtol=1e-5, atol=1e-5)
    save(model, tmp_path / "again")
    for name, entry in stored_tensors(tmp_path / "model").items():
        other = stored_tensors(tmp_path / "again")[name]
        assert (entry.dtype, entry.shape) == (other.dtype, other.shape)
    torch.testing.assert_close(output(load(tmp_path / "again"), inputs), output(plain, inputs))


def test_the_plain_refusals_stay(tmp_path):
    model = BY_NAME["llama"].model()
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "model", state_dict=state)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_mapped(tmp_path / "model", scratch=tmp_path / "scratch")
    # And nothing of loading is left behind.
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
    assert not nn.modules.module._global_parameter_registration_hooks


def test_the_environment_is_put_back(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0")
    BY_NAME["llama"].model().save_pretrained(tmp_path / "model")
    load_mapped(tmp_path / "model", scratch=tmp_path / "scratch")
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "0"
    assert not (tmp_path / "scratch").exists()  # nothing had to be written


def test_what_is_written_out_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "SMALL", 0)
    BY_NAME["mixtral"].model().save_pretrained(tmp_path / "model")
    written, move = [], mapped._move
    monkeypatch.setattr(
        mapped, "_move", lambda tensors, path, **how: written.append(path) or move(tensors, path, **how)
    )
    model = load_mapped(tmp_path / "model", scratch=tmp_path / "scratch")
    assert written
    assert all(tmp_path / "scratch" in path.parents for path in written)
    assert not list((tmp_path / "scratch").iterdir())
    assert all(is_mapped(parameter) for parameter in model.parameters())


def test_a_scratch_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "SMALL", 0)
    BY_NAME["mixtral"].model().save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.* cannot be written .*choose another"):
        load_mapped(tmp_path / "model", scratch=tmp_path / "file" / "scratch")


def test_models_of_other_threads_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "SMALL", 0)
    made = []
    with mapped._written_out(tmp_path):
        thread = threading.Thread(target=lambda: made.append(nn.Linear(4, 4)))
        thread.start()
        thread.join()
        made.append(nn.Linear(4, 4))
    assert [is_mapped(linear.weight) for linear in made] == [False, True]


@pytest.mark.parametrize("form", RANK_FORMS)
def test_spooled_forms_are_what_they_were(form, tmp_path):
    stream = torch.Generator().manual_seed(0)
    module = FORMS[form](24, 32, 8, True).eval()
    module.store(torch.randn(32, 8, generator=stream), torch.randn(8, 24, generator=stream), torch.randn(32))
    x = torch.randn(5, 24, generator=stream)
    before = {
        name: (id(tensor), tensor.clone()) for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    module.first.weight.requires_grad_(False)
    with torch.no_grad():
        expected = module(x)
        spool(module, tmp_path / "new" / "form.safetensors")
        torch.testing.assert_close(module(x), expected)
    assert {name: id(t) for name, t in (*module.named_parameters(), *module.named_buffers())} == {
        name: identity for name, (identity, _) in before.items()
    }
    stored = dict((*module.named_parameters(), *module.named_buffers()))
    for name in module.state_dict().keys() - {"weight"}:  # the guard
        assert is_mapped(stored[name]), name
        assert torch.equal(stored[name], before[name][1])
    assert not module.first.weight.requires_grad
    assert module.second.weight.requires_grad
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["form.safetensors"]
    with safe_open(tmp_path / "new" / "form.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(module.state_dict()) - {"weight"}


def test_writing_into_a_spooled_module_leaves_the_file(tmp_path):
    linear = nn.Linear(4, 4)
    spool(linear, tmp_path / "x.safetensors")
    with torch.no_grad():
        linear.weight.fill_(7)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert not (file.get_tensor("weight") == 7).any()
    spool(linear, tmp_path / "x.safetensors")  # over the file that it lies in
    assert (linear.weight == 7).all()
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert (file.get_tensor("weight") == 7).all()


def test_ties_and_unstored_buffers(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
            self.other.weight = self.one.weight
            self.same = nn.Parameter(self.one.bias.data)  # another object over the same numbers
            self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).T)
            self.own = nn.Parameter(torch.ones(2))
            self.register_buffer("empty", torch.empty(0))
            self.register_buffer("away", torch.ones(2), persistent=False)

    model = Tied()
    spool(model, tmp_path / "x.safetensors")
    assert model.one.weight is model.other.weight
    assert model.same.data_ptr() == model.one.bias.data_ptr()
    assert torch.equal(model.turned, torch.arange(6.0).view(2, 3).T)
    assert not is_mapped(model.away)
    assert not is_mapped(model.empty)
    alone = Tied()
    spool(alone, tmp_path / "alone.safetensors", recurse=False)
    assert is_mapped(alone.own)
    assert not is_mapped(alone.one.weight)


def test_a_file_that_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    linear = nn.Linear(4, 4)

    def full(tensors, path, **_):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "save_file", full)
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be written \(.*No space left"):
        spool(linear, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    assert not is_mapped(linear.weight)


def test_clones_casts_and_own_storage_of_mapped_models(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "SMALL", 0)
    BY_NAME["mixtral"].model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    model = load_mapped(tmp_path / "model", scratch=tmp_path / "scratch")
    clone = shared_clone(model)
    assert {p.data_ptr() for p in clone.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert clone.lm_head.weight is clone.model.embed_tokens.weight

    def away(module, name):
        spool(module, tmp_path / "cast" / f"{name}.safetensors", recurse=False)

    cast(clone, torch.bfloat16, changed=away)
    assert all(is_mapped(p) and p.dtype == torch.bfloat16 for p in clone.parameters())
    assert all(is_mapped(p) and p.dtype == torch.float32 for p in model.parameters())
    assert clone.lm_head.weight is clone.model.embed_tokens.weight
    module = FORMS["lowrank"](32, 32, 4, False)
    replace_module(clone, "model.layers.0.self_attn.q_proj", module.to(torch.bfloat16))
    spool(module, tmp_path / "form.safetensors")
    save(clone, tmp_path / "out")
    found = load_mapped(tmp_path / "out", scratch=tmp_path / "scratch")  # factored, and its experts fused
    assert all(is_mapped(parameter) for parameter in found.parameters())
    for name, tensor in clone.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    other = shared_clone(model)
    unshare_storage(other, model)
    assert not any(is_mapped(parameter) for parameter in other.parameters())
