"""Block by block or as a whole: the same result, chosen by what there is of memory, which is reported beforehand."""

import json
import os
import re
import shutil
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME, scaled
from safetensors.torch import load
from tiny import Done, Workdir, llama, make_workdir, place, published
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import eckart
from eckart.compression import memory_estimate
from eckart.compression.memory_estimate import MemoryEstimate, estimate_memory
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.methods import method_named
from eckart.model import dense_weight, factored_modules, shared_parameters

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
GB = 10**9


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Workdir:
    return make_workdir(tmp_path_factory.mktemp("workdir"))


def recipe_of(model: Path, text: Path, **more: Any) -> Recipe:
    small: dict[str, Any] = {"num_samples": 12, "max_seq_length": 32, "batch_size": 4}
    return Recipe(**{"model": str(model), "data": str(text), **small, **more})


def compressed(output: Path, recipe: Recipe, **more: Any) -> tuple[eckart.Result, list[str]]:
    """A run, and what it told before it began."""
    told: list[str] = []
    result = eckart.compress(recipe=recipe, output_dir=output, report_progress=told.append, **more)
    folder = result.folder
    assert folder == output
    return result, told


def way_of(said: str) -> str:
    """How a run works, without the device."""
    return said.removeprefix("on cpu, ")


def products(result: eckart.Result) -> dict[str, Tensor]:
    """The weights that the factors of all sites stand for."""
    return {name: dense_weight(form).double() for name, form in factored_modules(result.model).items()}


def alike(one: Any, other: Any, place: str = "report") -> None:
    """Two reports say the same, numbers but for rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one.keys() - {"seconds", "stream", "calibrated"}:
            alike(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for i, (first, second) in enumerate(zip(one, other, strict=True)):
            alike(first, second, f"{place}[{i}]")
    else:
        assert other == (pytest.approx(one, rel=1e-3, abs=1e-6) if isinstance(one, float) else one), place


# -- the same, whichever way -------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "eckart": {},  # reads all that kfac and drone read
    "svd": {"method": "svd"},
    "joint": {"form": "joint", "keep": 0.2},  # weights that share an input factor are refitted together
    "float16 in shards, another type is stored": {
        "method": "drone",
        "checkpoint": torch.float16,
        "shards": "100KB",
        "dtype": "float32",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_streamed_and_whole_give_the_same(case, workdir, tmp_path, monkeypatch):
    """And what is asked for is followed, whatever memory is free."""
    options = dict(CASES[case])
    checkpoint, shards = options.pop("checkpoint", torch.bfloat16), options.pop("shards", "1GB")
    source = place(llama(), tmp_path / "source", checkpoint, max_shard_size=shards)
    assert len(list(source.glob("*.safetensors"))) == (1 if shards == "1GB" else 3)
    results = {}
    for stream, free in (("off", 1000), ("on", 10**15)):
        monkeypatch.setattr(memory_estimate, "free_memory", lambda _, free=free: free)
        results[stream], told = compressed(tmp_path / stream, recipe_of(source, workdir.text, stream=stream, **options))
        assert way_of(told[0]).startswith("in memory, as a whole" if stream == "off" else "block by block")
    whole, streamed = results["off"], results["on"]
    if case != "svd":
        assert streamed.report["calibrated"] == "block by block, 4 blocks"
    assert streamed.plan.choices == whole.plan.choices
    ties = shared_parameters(streamed.model)
    assert ties == shared_parameters(whole.model)
    assert bool(ties) or case != "joint"
    alike(whole.report, streamed.report)
    expected, found = products(whole), products(streamed)
    assert expected.keys() == found.keys() != set()
    stored = getattr(torch, options.get("dtype") or str(checkpoint).removeprefix("torch."))
    assert {p.dtype for p in streamed.model.parameters()} == {stored}
    tolerance = 1e-4 if stored == torch.float32 else 2e-2  # what rounds the other way is off by a bit
    for name, wanted in expected.items():
        assert (found[name] - wanted).norm() <= tolerance * wanted.norm(), name


def test_a_streamed_checkpoint_is_loaded_by_from_pretrained(workdir, tmp_path, monkeypatch):
    """Written in several files; tied and untied; experts that lie fused in memory and apart in files."""
    mixtral = BY_NAME["mixtral"].model(vocab_size=8192)
    sources = {
        "tied": place(llama(tie_word_embeddings=True), tmp_path / "source-tied", max_shard_size="200KB"),
        "float16": place(llama(), tmp_path / "source-float16", torch.float16),
        "experts": place(mixtral, tmp_path / "source-experts", max_shard_size="200KB"),
    }
    monkeypatch.setattr("eckart.compression.open_run.STREAMED_SHARD", "100KB")
    logits = {}
    for name, source in sources.items():
        result, _ = compressed(tmp_path / name, recipe_of(source, workdir.text, stream="on", method="drone", keep=0.6))
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        with torch.no_grad():
            logits[name] = result.model(torch.arange(5, 25)[None]).logits
    assert any(name.endswith(".each.0.up") and choice.form != "dense" for name, choice in result.plan.choices.items())
    for name, expected in logits.items():
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, info)
        with torch.no_grad():
            assert torch.equal(model(torch.arange(5, 25)[None]).logits, expected), name


# -- which way is chosen -----------------------------------------------------------------------------


def test_the_way_and_its_memory_are_reported_first(server, workdir, tmp_path):
    for stream, words in (
        (
            "off",
            r"on cpu, in memory, as a whole: about [\d.]+ [GMk]?B at the peak \(.*block [\d.]+.*\), [\d.]+ GB free",
        ),
        (
            "on",
            r"on cpu, block by block: about [\d.]+ [GMk]?B at the peak \(.*statistics .*\), .* free; "
            r"[\d.]+ [GMk]?B of disk",
        ),
    ):
        done = server(workdir.words(tmp_path / stream, "--method", "drone", "--stream", stream))
        assert done.code == 0, done.said
        assert re.fullmatch(words, done.said.splitlines()[0]), done.said
    (tmp_path / "empty.txt").touch()
    refused = server(workdir.words(tmp_path / "no", "--stream", "on", "--data", tmp_path / "empty.txt"))
    assert refused.code == 1
    assert way_of(refused.said).startswith("block by block: about")  # before the text is read


@pytest.mark.parametrize(("part", "way"), [(1.3, "in memory"), (1.2, "block by block")])
def test_auto_streams_where_memory_is_short(part, way, workdir, tmp_path, monkeypatch):
    recipe = recipe_of(workdir.model, workdir.text, method="svd", stream="auto")
    monkeypatch.setattr(memory_estimate, "rss", lambda: 0)
    total = estimated(recipe).whole.total
    monkeypatch.setattr(memory_estimate, "free_memory", lambda _: int(part * total))
    _, told = compressed(tmp_path / "out", recipe)
    assert way_of(told[0]).startswith(way)
    assert os.listdir(tmp_path) == ["out"]


def test_auto_where_nobody_knows_what_is_free(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_estimate, "free_memory", lambda _: None)
    _, told = compressed(tmp_path / "out", recipe_of(workdir.model, workdir.text, method="svd"))
    assert way_of(told[0]).startswith("in memory")
    assert "free" not in told[0]


def test_auto_resumes_in_the_way_that_was_begun(server, workdir, tmp_path):
    words = workdir.words(tmp_path / "out", "--method", "drone")
    whole = server(words, free=10_000)
    assert way_of(whole.said).startswith("block by block")
    expected = published(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    killed = server(words, whole.ticks.index("<Journal.write", whole.ticks.index(">solve_site")) + 1, free=10_000)
    assert killed.code < 0
    done = server(words)  # there is memory enough now
    assert way_of(done.said).startswith("block by block")
    assert 0 < done["solve_site"] < whole["solve_site"]
    assert published(tmp_path / "out") == expected


# -- what it will take -------------------------------------------------------------------------------


@cache
def meta_model(**config: int) -> LlamaForCausalLM:
    options = {"vocab_size": 8192, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
               "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**options, **config}))


def estimated(recipe: Recipe, room_for: int | None = None, **config: int) -> MemoryEstimate:
    settings = Settings.of(method_named(recipe.method), recipe)
    return estimate_memory(meta_model(**config), recipe, settings, room_for)


def parts(estimate: Any) -> int:
    """All but the program itself, which has grown meanwhile."""
    return estimate.total - estimate.program


LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
         "vocab_size": 32000, "max_position_embeddings": 2048}  # fmt: skip


@pytest.mark.parametrize("method", ["svd", "eckart"])
def test_memory_grows_with_depth_as_a_whole_and_does_not_block_by_block(method):
    found = [estimated(Recipe(method=method, dtype="bfloat16"), num_hidden_layers=n, **LARGE) for n in (2, 4, 8)]
    assert [needs.blocks for needs in found] == [2, 4, 8]
    assert len({parts(needs.streamed) for needs in found}) == 1
    block = 4 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)  # of its matrices, in float32
    for fewer, more in pairwise(found):
        grown = parts(more.whole) - parts(fewer.whole)
        assert grown > block * (more.blocks - fewer.blocks)
        assert parts(more.whole) > parts(more.streamed)
        assert more.disk > fewer.disk
        assert found[0].streamed.block > block


def test_what_makes_an_estimate_larger():
    less = estimated(Recipe(method="drone", batch_size=1), **LARGE)
    for more in (
        {"batch_size": 8},
        {"method": "kfac", "batch_size": 1},
        {"method": "drone", "batch_size": 1, "keep": 1},
        {"method": "drone", "batch_size": 1, "form": "sliced"},
    ):
        found = estimated(Recipe(**{"method": "drone", **more}), **LARGE)
        assert parts(found.whole) > parts(less.whole), more
        assert parts(found.streamed) >= parts(less.streamed), more
    wide = estimated(Recipe(method="drone", batch_size=1), **{**LARGE, "vocab_size": 128_000})
    # Two models' predictions of 512 tokens at least.
    assert parts(wide.streamed) - parts(less.streamed) > 2 * 512 * 96_000 * 4
    assert estimated(Recipe(method="drone", cache_memory=0), **LARGE).streamed.text < 10 * GB


def test_blocks_at_once_follow_the_room_there_is():
    recipe = Recipe(method="kfac", batch_size=1)
    whole = parts(estimated(recipe, num_hidden_layers=8, **LARGE).whole)
    counts = [estimated(recipe, part * whole // 4, num_hidden_layers=8, **LARGE).at_once for part in (0, 1, 4, 8)]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] >= 8


DEEP = {"hidden_size": 256, "intermediate_size": 256}
WIDE = {"vocab_size": 65_536}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what memory no file backs")
def test_measured_memory_is_below_the_estimate_and_does_not_grow_with_depth(server, workdir, tmp_path):
    def grown(stream: str, **config: Any) -> int:
        """Bytes at the peak of a run, what is imported on the way included."""
        model = tmp_path / "-".join(map(str, config.values()))
        if not model.exists():
            place(llama(tie_word_embeddings=True, **config), model, max_shard_size="5MB")
        output = tmp_path / "out"
        shutil.rmtree(output, ignore_errors=True)
        words = workdir.words(output, "--method", "drone", "--stream", stream, "--cache-memory", 0.001)
        done = server([words[0], str(model), *words[2:]], watch=True, shard="5MB")
        assert done.code == 0, done.said
        return done.grown

    def expected(**config: Any) -> int:
        return parts(
            estimated(recipe_of(workdir.model, workdir.text, method="drone", cache_memory=0.001), **config).streamed
        )

    least = grown("on", num_hidden_layers=2)
    layers = 10 * 4 * 6 * 256 * 256  # those that the deep one has more, in float32; k and v are half as large
    shallow = grown("on", num_hidden_layers=2, **DEEP)
    deep = grown("on", num_hidden_layers=12, **DEEP)
    assert deep - shallow < layers / 2
    assert deep - least < expected(**DEEP)
    assert grown("off", num_hidden_layers=12, **DEEP) - deep > layers
    wide = grown("on", num_hidden_layers=2, **WIDE) - least
    assert 2 * 128 * 57_344 * 4 < wide < expected(**WIDE)  # two models' predictions of 128 tokens at least


# -- models that cannot be run block by block --------------------------------------------------------------------

DENSELY = '''
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class DenselyConfig(PretrainedConfig):
    model_type = "densely"
    vocab_size, hidden_size, max_position_embeddings = 8192, 32, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x, first):
        return x + self.down((self.up(x) * self.up(first)).tanh())


class DenselyForCausalLM(PreTrainedModel):
    """Every block reads what the first one put out."""

    config_class = DenselyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.head = nn.Linear(32, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = first = self.embed(input_ids)
        for i, block in enumerate(self.blocks):
            x = block(x, first)
            first = x if i == 0 else first
        return CausalLMOutput(logits=self.head(x))
'''
OWN_CODE = {
    "architectures": ["DenselyForCausalLM"],
    "auto_map": {
        "AutoConfig": "modeling_densely.DenselyConfig",
        "AutoModelForCausalLM": "modeling_densely.DenselyForCausalLM",
    },
    "model_type": "densely",
}


@pytest.fixture(scope="module")
def densely(tmp_path_factory) -> Path:
    """A checkpoint with code of its own, of a model that cannot be run block by block."""
    folder = tmp_path_factory.mktemp("densely") / "model"
    folder.mkdir()
    code: dict[str, Any] = {}
    exec(DENSELY, code)
    torch.manual_seed(0)
    place(scaled(code["DenselyForCausalLM"](code["DenselyConfig"]())), folder, torch.float32)
    (folder / "modeling_densely.py").write_text(DENSELY)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | OWN_CODE))
    return folder


def compress_densely(
    server, workdir, densely, output: Path, stream: str = "on", at: int | None = None, **more: Any
) -> Done:
    words = ["compress", densely, *workdir.words(output)[2:], "--trust-remote-code", "--stream", stream]
    return server([*map(str, words), "--method", "kfac"], at, **more)


def test_a_model_that_cannot_be_run_block_by_block_is_run_whole(server, workdir, densely, tmp_path):
    made = {}
    for stream in ("on", "off"):
        done = compress_densely(server, workdir, densely, tmp_path / stream, stream)
        assert done.code == 0, done.said
        made[stream] = published(tmp_path / stream)
    report = made["on"]["eckart/report.json"]
    words = r"DenselyForCausalLM cannot be run block by block \(block by block, .*\): whole passes instead"
    assert [note for note in report["notes"] if re.fullmatch(words, note)]
    assert report["calibrated"].startswith("in whole passes")
    assert made["on"]["eckart/plan.json"] == made["off"]["eckart/plan.json"]
    weights = [load(made[stream]["model.safetensors"]) for stream in made]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5)


def test_whole_passes_resume_with_other_memory(server, workdir, densely, tmp_path):
    """Three blocks' statistics fit then; now fewer, so that a window is begun, or as many."""

    def plain(folder: Path) -> dict[str, Any]:
        """Without what names the number of blocks."""
        found = published(folder)
        del found["README.md"], found["eckart/report.json"]["calibrated"]
        return found

    whole = compress_densely(server, workdir, densely, tmp_path / "whole", at_once=3)
    assert whole.code == 0, whole.said
    expected = plain(tmp_path / "whole")
    first = whole.ticks.index("<Journal.write", whole.ticks.index(">solve_site")) + 1
    for now in (2, 3):
        output = tmp_path / str(now)
        assert compress_densely(server, workdir, densely, output, at=first, at_once=3).code < 0
        done = compress_densely(server, workdir, densely, output, at_once=now)
        assert done.code == 0, done.said
        found = plain(output)
        assert found["eckart/report.json"] == expected["eckart/report.json"]
        assert found == expected
        assert done["solve_site"] == 4 or now != 3
