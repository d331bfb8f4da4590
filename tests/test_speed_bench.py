"""Benchmarks of whole models: what runs, where its time is booked, what the numbers are said to mean."""

import copy
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from architectures import BY_NAME
from torch import nn

import eckart
from eckart.cli.app import app
from eckart.compression.measure import time_models
from eckart.config import check_recipe
from eckart.errors import UsageError
from eckart.forms import FORMS
from eckart.model import find_sites, replace_module, separate_experts, share_parameters, shared_clone
from eckart.speed import bench as benches
from eckart.speed import kinds, memory, phases, subjects
from eckart.speed.allowed import Allowed, find_allowed
from eckart.speed.clock import Timing, take_processor
from eckart.speed.latency import compare_latency
from eckart.speed.module_times import own_seconds, time_modules
from eckart.speed.recipe import BenchRecipe
from eckart.speed.verdict import judge

LLAMA, BERT = BY_NAME["llama"], BY_NAME["bert-classes"]


def factored(model, rank: int = 4, form: str = "lowrank"):
    """A copy whose weights are random factors."""
    smaller = copy.deepcopy(model)
    for site in find_sites(model).chosen:
        module = FORMS[form].empty(*site.shape, rank, bias=site.has_bias, source=site.source)
        nn.init.normal_(module.first.weight, std=0.1)
        nn.init.normal_(module.second.weight, std=0.1)
        if site.has_bias:
            nn.init.zeros_(module.second.bias)
        replace_module(smaller, site.name, module.eval())
    return smaller


@pytest.fixture
def clock(monkeypatch):
    """Every run is called once; its time is a number that the test says, by name."""
    seconds: dict[str, float] = {}

    def measure(runs, **options):
        for run in runs.values():
            run()
        return {name: Timing(seconds.get(name, 1.0), 0.5, 2.0, 3) for name in runs}

    monkeypatch.setattr(benches, "measure_in_turn", measure)
    return seconds


# -- recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "read"), [("1,32", (1, 32)), (["1,8", "8", "4"], (1, 8, 4)), (16, (16,)), ((2, 3), (2, 3))]
)
def test_sizes_are_read_as_they_are_written(given, read):
    assert check_recipe(BenchRecipe, {"batch_sizes": given, "lengths": given}) == BenchRecipe(
        batch_sizes=read, lengths=read
    )


@pytest.mark.parametrize("given", ["", "1,x", [0], [], 2.5, None])
def test_sizes_that_are_none_are_refused(given):
    with pytest.raises(UsageError, match=r"lengths(\.\d)? = "):
        check_recipe(BenchRecipe, {"lengths": given})


# -- phases ------------------------------------------------------------------------------------------------------


def calls_of(model, run) -> list[dict]:
    seen: list[dict] = []
    handle = model.register_forward_pre_hook(lambda _, args, options: seen.append(dict(options)), with_kwargs=True)
    with torch.no_grad():
        run()
    handle.remove()
    return seen


def test_prefill_reads_the_prompt_and_gives_the_last_logits():
    model = LLAMA.model()
    run = phases.prepare(model, "prefill", 3, 5)
    (call,) = calls_of(model, run)
    assert call["input_ids"].shape == (3, 5)
    out = run()
    assert out.logits.shape[:2] == (3, 1)
    assert out.past_key_values.get_seq_length() == 5


def test_decode_makes_one_token_after_the_prompt_again_and_again():
    model = LLAMA.model()
    run = phases.prepare(model, "decode", 3, 5)
    first, again = calls_of(model, run)[0], calls_of(model, run)[0]
    assert first["input_ids"].shape == (3, 1)
    assert first["past_key_values"] is again["past_key_values"]
    assert first["past_key_values"].get_seq_length() == 5


def test_forward_has_no_cache_and_no_padding():
    model = BERT.model()
    (call,) = calls_of(model, phases.prepare(model, "forward", 64, 30))
    assert call["input_ids"].shape == (64, 30)
    assert not (call["input_ids"] == model.config.pad_token_id).any()
    assert call.get("use_cache") is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ("prefill", "decode")),
        ("gpt2", ("prefill", "decode")),
        ("bert", ("forward",)),
        ("t5", ("forward",)),
        ("vit", ("forward",)),
        ("mamba", ("forward",)),
    ],
)
def test_every_kind_of_model_runs(name, expected):
    model = BY_NAME[name].model()
    assert phases.phases_of(model) == expected
    assert phases.phases_of(model, decode=False) == expected[:1]
    with torch.no_grad():
        for phase in expected:
            phases.prepare(model, phase, 2, 6)()


def test_tokens_of_a_call():
    assert [phases.tokens_of(phase, 4, 100) for phase in ("forward", "prefill", "decode")] == [400, 400, 4]


def test_a_model_that_reads_sound_is_refused():
    model = BERT.model()
    model.main_input_name = "input_values"
    with pytest.raises(UsageError, match=r"reads input_values.*compare_latency"):
        phases.random_inputs(model, 1, 4)


def test_lengths_beyond_the_positions_are_refused():
    model = LLAMA.model()  # 64 positions
    phases.prepare(model, "prefill", 1, 64)
    with pytest.raises(UsageError, match="64 for decode, but the model has 64 positions"):
        phases.prepare(model, "decode", 1, 64)


def test_a_cache_that_cannot_be_shortened_is_refused():
    model = BY_NAME["mistral"].model(sliding_window=4)
    with pytest.raises(UsageError, match=r"cannot be shortened .*--no-decode"):
        phases.prepare(model, "decode", 1, 8)


def test_another_callable_runs_in_the_models_place():
    model, called = LLAMA.model(), []

    def call(**inputs):
        called.append(inputs["input_ids"].shape)
        return model(**inputs)

    for phase in ("prefill", "decode"):
        phases.prepare(model, phase, 2, 5, call)()
    assert called == [(2, 5), (2, 1)]


# -- where the time goes -----------------------------------------------------------------------------------------


def test_time_between_two_marks_belongs_to_the_innermost_open_module():
    marks = [("", True, 0.0), ("a", True, 1.0), ("a.b", True, 3.0), ("a.b", False, 7.0), ("a", False, 15.0)]
    marks += [("a.b", True, 31.0), ("a.b", False, 63.0), ("", False, 127.0)]
    assert own_seconds(marks) == {"": 1.0 + 16.0 + 64.0, "a": 2.0 + 8.0, "a.b": 4.0 + 32.0}


def test_modules_are_timed_whole_where_they_are_factored():
    model = factored(LLAMA.model())
    ticks = iter(range(10**6))
    run = phases.prepare(model, "prefill", 1, 4)
    with torch.no_grad():
        seconds = time_modules(model, run, repeats=2, mark=lambda: float(next(ticks)))
    assert seconds["model.layers.0.mlp.up_proj"] == 1.0  # from one mark to the next
    assert not any(name.endswith((".first", ".second")) for name in seconds)
    assert {"", "lm_head", "model.layers.1.self_attn", "model.norm"} <= set(seconds)
    before = next(ticks)
    with torch.no_grad():
        run()
    assert next(ticks) == before + 1  # no hook is left


def test_on_a_gpu_marks_are_events_and_the_host_waits_once_a_pass(monkeypatch):
    waits, queue = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.append(self)

        def elapsed_time(self, other):
            return 1000.0 * (queue.index(other) - queue.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(len(queue)))
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    seconds = time_modules(model, lambda: model(torch.zeros(1, 2)), repeats=2, device="cuda")
    assert waits == [6, 12]
    assert seconds == {"": 3.0, "0": 1.0, "1": 1.0}


def kinds_of(model, batch: int = 2, length: int = 6) -> dict[str, str]:
    with torch.no_grad():
        return kinds.find_kinds(model, phases.prepare(model, phases.phases_of(model)[0], batch, length))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama",
            {
                "model.layers.0.self_attn": kinds.SCORES,
                "model.layers.0.self_attn.q_proj": kinds.PROJECTIONS,
                "model.layers.0.self_attn.o_proj": kinds.PROJECTIONS,
                "model.layers.1.mlp.down_proj": kinds.FEED_FORWARD,
                "model.layers.1.mlp": kinds.ELEMENTWISE,
                "model.layers.1.mlp.act_fn": kinds.ELEMENTWISE,
                "model.layers.1": kinds.ELEMENTWISE,
                "model.layers.1.input_layernorm": kinds.NORMS,
                "model.norm": kinds.NORMS,
                "model.embed_tokens": kinds.EMBEDDINGS,
                "model.rotary_emb": kinds.OTHER,
                "lm_head": kinds.HEADS,
                "": kinds.OTHER,
            },
        ),
        (
            "bert-classes",
            {
                "bert.encoder.layer.0.attention.self": kinds.SCORES,
                "bert.encoder.layer.0.attention.self.query": kinds.PROJECTIONS,
                "bert.encoder.layer.0.attention.output.dense": kinds.PROJECTIONS,
                "bert.encoder.layer.0.attention.output.LayerNorm": kinds.NORMS,
                "bert.encoder.layer.1.intermediate.dense": kinds.FEED_FORWARD,
                "bert.encoder.layer.1.output.dense": kinds.FEED_FORWARD,
                "bert.embeddings.word_embeddings": kinds.EMBEDDINGS,
                "bert.pooler.dense": kinds.HEADS,
                "classifier": kinds.HEADS,
            },
        ),
        ("gpt2", {"transformer.h.0.attn": kinds.SCORES, "transformer.h.0.attn.c_attn": kinds.PROJECTIONS,
                  "transformer.h.0.mlp.c_fc": kinds.FEED_FORWARD, "transformer.h.0.ln_1": kinds.NORMS}),
        ("t5", {"encoder.block.0.layer.0.SelfAttention": kinds.SCORES,
                "decoder.block.0.layer.1.EncDecAttention.v": kinds.PROJECTIONS,
                "decoder.block.0.layer.2.DenseReluDense.wo": kinds.FEED_FORWARD}),
        ("bloom", {"transformer.h.0.self_attention": kinds.SCORES,
                   "transformer.h.0.mlp.dense_h_to_4h": kinds.FEED_FORWARD}),
        ("mixtral", {"model.layers.0.self_attn": kinds.SCORES, "model.layers.0.mlp.experts": kinds.FEED_FORWARD}),
        ("mamba", {"backbone.layers.0.mixer.in_proj": kinds.IN_BLOCKS}),
    ],
)  # fmt: skip
def test_kinds_are_found_without_names_of_architectures(name, expected):
    found = kinds_of(BY_NAME[name].model())
    assert {module: found.get(module) for module in expected} == expected


def test_eager_attention_is_seen_and_a_product_with_a_weight_is_none():
    model = LLAMA.model(attn_implementation="eager")
    found = kinds_of(model)
    assert [name for name, kind in found.items() if kind == kinds.SCORES] == [
        f"model.layers.{i}.self_attn" for i in (0, 1)
    ]


class Router(nn.Module):
    """A softmax of a product with a weight, which is no attention."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return torch.matmul(x, self.weight.mT).softmax(dim=-1)


def test_a_router_is_no_attention():
    model = nn.ModuleDict({"blocks": nn.ModuleList([Router()])})
    assert kinds.find_kinds(model, lambda: model["blocks"][0](torch.ones(2, 4))) == {"blocks.0": kinds.IN_BLOCKS}


def test_factored_weights_keep_their_kind():
    model = LLAMA.model()
    before, after = kinds_of(model), kinds_of(factored(model))
    assert before == after


def test_seconds_add_up_by_kind():
    names = {"a": kinds.NORMS, "b": kinds.FEED_FORWARD, "c": kinds.NORMS, "e": kinds.HEADS}
    found = kinds.add_up({"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0, "e": 0.0}, names)
    assert list(found.items()) == [(kinds.FEED_FORWARD, 2.0), (kinds.NORMS, 5.0), (kinds.OTHER, 8.0)]


# -- what is allowed ---------------------------------------------------------------------------------------------


def test_allowed_is_amdahls_law():
    assert Allowed(share=0.8, kept=0.5, layers=3).speedup == pytest.approx(1 / 0.6)
    assert Allowed(share=1.0, kept=0.25, layers=1).speedup == pytest.approx(4)
    assert Allowed(share=0.5, kept=1.0, layers=1).as_dict() == {
        "share_of_linear": 0.5, "kept_multiply_adds": 1.0, "layers": 1, "allowed": 1.0,
    }  # fmt: skip


def test_layers_that_became_smaller_count_with_their_time_and_multiply_adds():
    original = nn.ModuleDict({"a": nn.Linear(8, 16), "b": nn.Linear(8, 8), "c": nn.Linear(16, 8), "d": nn.ReLU()})
    smaller = copy.deepcopy(original)
    smaller["a"] = FORMS["lowrank"].empty(16, 8, 2, bias=True)  # 48 of 128
    smaller["c"] = nn.Linear(4, 8)  # fewer neurons: 32 of 128
    seconds = {"": 1.0, "a": 2.0, "b": 3.0, "c": 4.0, "d": 6.0}
    found = find_allowed(original, smaller, seconds)
    assert found == Allowed(share=6 / 16, kept=80 / 256, layers=2)
    assert find_allowed(original, original, seconds) is None
    assert find_allowed(original, smaller, {"b": 1.0}) is None


def test_a_shared_product_counts_once():
    original = nn.ModuleDict({name: nn.Linear(8, 16) for name in "abc"})
    smaller = nn.ModuleDict({name: FORMS["joint"].empty(16, 8, 4, bias=True) for name in "abc"})
    share_parameters(smaller, {"b.first.weight": "a.first.weight"})  # c is alone
    found = find_allowed(original, smaller, dict.fromkeys("abc", 1.0))
    assert found is not None
    assert found.kept == (2 * 4 * 8 + 3 * 4 * 16) / (3 * 8 * 16)


# -- memory ------------------------------------------------------------------------------------------------------


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))
        self.register_buffer("same", self.weight.detach())

    def forward(self, x):
        a = x + 1  # 4,000 bytes
        b = torch.cat([a, a])  # and 8,000
        del a
        b.add_(self.weight[0])
        c = torch.zeros(3000)  # and 12,000, when the first are gone
        return b.view(2, -1).mT.sum() + c.sum()


def test_peak_memory_is_what_lives_at_one_time():
    model, x = Steps(), torch.zeros(1000)
    with torch.no_grad():
        peak = memory.peak_bytes(model, lambda: model(x))
        assert memory.peak_bytes(model, lambda: model(x)) == peak
    assert memory.held_bytes(model) == 4000  # a storage counts once
    assert 4000 + 20000 <= peak < 4000 + 20100


def test_on_a_gpu_the_allocator_counts(monkeypatch):
    model, done = Steps(), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 50_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 50_700)
    assert memory.peak_bytes(model, lambda: done.append("run"), "cuda") == 4000 + 700
    assert done == ["wait", "reset", "run", "wait"]


# -- int8, bfloat16 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_int8_keeps_what_the_model_computes_and_the_original_as_it_is(name):
    model = BY_NAME[name].model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantized = subjects.quantize_int8(model, torch.device("cpu"))
    ids = phases.random_inputs(model, 2, 8)
    with torch.no_grad():
        error = (quantized(**ids).logits - model(**ids).logits).norm() / model(**ids).logits.norm()
    assert 0 < error < 0.1
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_factored_model_in_int8_is_the_same_model_and_a_quantized_one_has_no_baselines():
    model = LLAMA.model()
    small = factored(model)
    original = subjects.Subject("original", "original", model, "float32", "original", {})
    other = subjects.Subject("small", "model", small, "float32", "small", {})
    made = {subject.name: subject for subject in subjects.add_baselines([original, other], torch.device("cpu"))[0]}
    assert set(made) == {"original bfloat16", "small bfloat16", "original int8", "small int8"}
    assert made["small int8"].of == "small"
    ids = phases.random_inputs(model, 2, 8)
    with torch.no_grad():
        wanted, found = small(**ids).logits, made["small int8"].model(**ids).logits
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.1
    assert not any(isinstance(part, nn.Linear) for part in made["small int8"].model.modules())
    pytest.importorskip("torchao", reason="needs torchao: pip install 'eckart[quant]'")
    rounded = shared_clone(small)
    eckart.quantize(rounded, "int8")
    quantized = subjects.Subject("small", "model", rounded, "int8", "small", {})
    made = subjects.add_baselines([original, quantized], torch.device("cpu"))[0]
    assert {subject.name for subject in made} == {"original bfloat16", "original int8"}


def test_a_quantized_folder_is_timed_as_it_is(clock, tmp_path):
    pytest.importorskip("torchao", reason="needs torchao: pip install 'eckart[quant]'")
    model = LLAMA.model()
    small = factored(model)
    eckart.quantize(small, "int8-dynamic")
    small.save_pretrained(tmp_path / "small")
    found = eckart.bench(tmp_path / "small", model, batch_sizes=1, lengths=4, decode=False, device="cpu")
    described = {row["name"]: row for row in found["models"]}
    assert described["small"]["dtype"] == "int8-dynamic"
    assert described["small"]["held_bytes"] < described["original"]["held_bytes"]
    assert {row["model"] for row in found["rows"]} == {"original", "small", "original bfloat16", "original int8"}
    assert next(row for row in found["rows"] if row["model"] == "small")["layers"] == 14


def test_without_torchao_a_gpu_has_no_int8_and_a_note_says_so(monkeypatch):
    for module in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    model = LLAMA.model()
    original = subjects.Subject("original", "original", model, "float32", "original", {})
    made, notes = subjects.add_baselines([original], torch.device("cuda"))
    assert [(subject.name, subject.dtype) for subject in made] == [("original bfloat16", "bfloat16")]
    assert "eckart[quant]" in notes[0]


def test_on_a_gpu_torchao_makes_int8(monkeypatch):
    done = []
    config = object()
    fake = SimpleNamespace(
        Int8DynamicActivationInt8WeightConfig=lambda: config, quantize_=lambda model, how: done.append((model, how))
    )
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=fake))
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    model = BY_NAME["gpt2"].model()
    made = subjects.quantize_int8(model, torch.device("cuda"))
    ((quantized, how),) = done
    assert made is quantized is not model
    assert how is config
    kinds_of_layers = {type(module).__name__ for module in made.modules()}
    assert "Conv1D" not in kinds_of_layers
    assert "Conv1D" in {type(module).__name__ for module in model.modules()}


# -- the whole ---------------------------------------------------------------------------------------------------


def test_bench_puts_every_model_and_size_side_by_side(clock):
    model = LLAMA.model()
    clock |= {"original": 6.0, "small": 4.0, "original bfloat16": 2.0, "small bfloat16": 1.0}
    small = factored(model)
    state = torch.get_rng_state()
    found = eckart.bench({"small": small}, model, batch_sizes="1,2", lengths=(5,), device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    json.dumps(found, allow_nan=False)
    names = ["original", "small", "original bfloat16", "small bfloat16", "original int8", "small int8"]
    assert [row["name"] for row in found["models"]] == names
    assert [row["role"] for row in found["models"]] == ["original", "model", *["baseline"] * 4]
    assert [(r["phase"], r["batch"], r["length"], r["model"]) for r in found["rows"]] == [
        (phase, batch, 5, name) for phase in ("prefill", "decode") for batch in (1, 2) for name in names
    ]
    by_name = {row["model"]: row for row in found["rows"] if (row["phase"], row["batch"]) == ("prefill", 2)}
    row = by_name["small"]
    assert {name: row["speedup"] for name, row in by_name.items()} == {
        "original": 1.0, "small": 1.5, "original bfloat16": 3.0, "small bfloat16": 6.0, "original int8": 6.0,
        "small int8": 6.0,
    }  # fmt: skip
    assert row["tokens_per_second"] == 2 * 5 / 4.0
    assert row["reached"] == pytest.approx(1.5 / row["allowed"])
    assert row["layers"] == 14
    assert 0 < row["share_of_linear"] < 1
    assert row["peak_bytes"] < by_name["original"]["peak_bytes"]
    assert by_name["original int8"]["peak_bytes"] is None
    assert by_name["original"]["reached"] is None
    assert len(found["shares"]) == 8
    assert all(sum(row["shares"].values()) == pytest.approx(1) for row in found["shares"])
    assert len(found["verdict"]) == 2
    assert found["notes"] == []
    assert not model.training
    assert model.dtype == torch.float32


def test_folders_say_how_long_they_load_and_how_large_they_are(clock, tmp_path):
    model = BERT.model()
    for name in ("dense", "again"):
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
    found = eckart.bench([tmp_path / "again"], tmp_path / "dense", batch_sizes=1, lengths=4, baselines=False)
    assert [row["name"] for row in found["models"]] == ["original", "again"]
    stored = sum(parameter.numel() for parameter in model.parameters()) * 2
    assert all(row["file_bytes"] == stored and row["load_seconds"] > 0 for row in found["models"])
    assert {row["dtype"] for row in found["models"]} == {"bfloat16"}
    assert found["verdict"] == []
    assert [row["phase"] for row in found["rows"]] == ["forward"] * 2
    assert "allowed" not in found["rows"][1]  # nothing is smaller


def test_without_an_original_there_are_no_speedups(clock):
    found = eckart.bench(BERT.model(), batch_sizes=1, lengths=4, dtype="bfloat16")
    (row,) = found["rows"]
    assert (row["model"], row["speedup"], row["reached"]) == ("model", None, None)
    assert found["verdict"] == []
    assert "--against" in found["notes"][0]


@pytest.mark.parametrize(("seconds", "passes"), [(0.001, 5), (0.9, 3), (60.0, 1)])
def test_modules_are_timed_in_fewer_passes_where_they_last_long(clock, monkeypatch, seconds, passes):
    asked = []

    def time_them(model, run, *, repeats, **more):
        asked.append(repeats)
        return {"": 1.0}

    monkeypatch.setattr(benches, "time_modules", time_them)
    clock["model"] = seconds
    eckart.bench(BERT.model(), batch_sizes=1, lengths=4, baselines=False)
    assert asked == [passes]


def test_the_processors_clock_is_for_one_thread_of_a_cpu(clock, monkeypatch):
    model = BERT.model()
    options = {"batch_sizes": 1, "lengths": 4, "baselines": False}
    asked = []

    def measure(runs, *, stopwatch, **more):
        asked.append(stopwatch)
        return {name: Timing(1.0, 1.0, 1.0, 1) for name in runs}

    def mark_times(model, run, *, mark, **more):
        asked.append(mark)
        return {"": 1.0}

    monkeypatch.setattr(benches, "measure_in_turn", measure)
    monkeypatch.setattr(benches, "time_modules", mark_times)
    assert eckart.bench(model, clock="processor", **options)["clock"] == "processor"
    eckart.bench(model, **options)
    assert asked == [take_processor, time.process_time, None, None]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(UsageError, match="2 threads compute on cpu"):
        eckart.bench(model, clock="processor", **options)


def test_models_are_named_by_the_end_of_their_path_where_that_tells_them_apart():
    assert benches._named(["a/x", "b/y"], "m") == [("original", "m"), ("x", "a/x"), ("y", "b/y")]
    assert benches._named(["a/x", "b/x"], None) == [("a/x", "a/x"), ("b/x", "b/x")]
    assert benches._named("a/original", "m") == [("original", "m"), ("a/original", "a/original")]
    for wrong in ({"original": "m"}, [], ["a/x", "a/x"]):
        with pytest.raises(UsageError, match="name of its own"):
            benches._named(wrong, None)


def test_models_of_different_classes_are_refused():
    with pytest.raises(UsageError, match=r"LlamaForCausalLM.*Bert"):
        eckart.bench(LLAMA.model(), BERT.model())


def test_a_baseline_that_does_not_run_is_left_out_with_a_note(clock, monkeypatch):
    def broken(model, device):
        clone = copy.deepcopy(model)
        clone.model.norm.forward = lambda x: x.weight
        return clone

    monkeypatch.setattr(subjects, "quantize_int8", broken)
    model = LLAMA.model()
    found = eckart.bench(model, model, batch_sizes=1, lengths=4, decode=False, dtype="bfloat16")
    assert [row["model"] for row in found["rows"]] == ["original", "model"]
    assert "original int8 does not run and is left out" in found["notes"][0]


def test_compiled_models_are_timed_too_and_failures_are_said(clock, monkeypatch):
    asked = []

    def compile_model(model, **options):
        asked.append(options)
        if len(asked) == 2:
            return lambda **inputs: (_ for _ in ()).throw(RuntimeError("No working C++ compiler found\nmore"))
        return model

    monkeypatch.setattr(torch, "compile", compile_model)
    model = BERT.model()
    model.to(torch.bfloat16)
    found = eckart.bench({"a": model, "b": model}, model, batch_sizes=1, lengths=4, compile=True)
    eager = ["original", "a", "b", "original int8"]
    assert [row["model"] for row in found["rows"] if row["mode"] == "eager"] == eager
    assert [row["model"] for row in found["rows"] if row["mode"] == "compiled"] == ["original", "b"]
    assert asked == [{"dynamic": False}] * 3
    assert found["notes"] == ["torch.compile does not work here for a: RuntimeError: No working C++ compiler found"]


# -- what it means -----------------------------------------------------------------------------------------------

ROLES = [
    {"name": "original", "role": "original", "of": "original"},
    {"name": "small", "role": "model", "of": "small"},
    {"name": "original bfloat16", "role": "baseline", "of": "original"},
    {"name": "original int8", "role": "baseline", "of": "original"},
    {"name": "small bfloat16", "role": "baseline", "of": "small"},
]


@pytest.mark.parametrize(
    ("speedups", "says"),
    [
        ({"small": 1.5}, "small is 1.50 times as fast as the original."),
        ({"small": 1.5, "original int8": 1.2}, "1.50 times as fast as the original, more than original int8 (1.20"),
        ({"small": 0.9}, "0.90 times as fast as the original: factoring is not the thing to do for speed here"),
        ({"small": 0.9, "original int8": 0.95}, "0.90 times as fast as the original: factoring is not"),
        (
            {"small": 1.5, "original bfloat16": 2.5, "original int8": 1.2},
            "original bfloat16 without any factoring 2.50 times: factoring alone is not the thing to do here.",
        ),
        (
            {"small": 1.5, "original bfloat16": 2.5, "small bfloat16": 3.5},
            "not the thing to do here; small bfloat16, which is both, is 3.50 times as fast.",
        ),
        (
            {"small": 1.5, "original bfloat16": 2.5, "small bfloat16": 2.0},
            "small bfloat16 (2.00 times) gains nothing over it.",
        ),
    ],
)
def test_the_verdict_follows_from_the_numbers(speedups, says):
    rows = [
        {"phase": "forward", "mode": mode, "model": name, "speedup": value * factor}
        for name, value in {"original": 1.0, **speedups}.items()
        for mode, factor in (("eager", 2.0), ("eager", 0.5), ("compiled", 10.0))  # geometric mean of the eager ones
    ]
    (sentence,) = judge(rows, ROLES)
    assert sentence.startswith("forward: small is ")
    assert says in sentence


# -- latency of two models on their data -------------------------------------------------------------------------


def test_latency_of_two_models_in_turn(monkeypatch):
    from eckart.speed import latency

    def measure(runs, **options):
        shapes = [run()[0].shape for run in runs.values()]
        assert shapes == [(4, 3)] * 2
        return {"original": Timing(3.0, 3.0, 3.0, 5), "eckart": Timing(2.0, 2.0, 2.0, 5)}

    monkeypatch.setattr(latency, "measure_in_turn", measure)
    model = BERT.model().train()
    found = compare_latency({"original": model, "eckart": factored(model)}, {**BERT.batches()[0], "labels": None})
    assert (found["batch"], found["length"], found["device"], found["dtype"]) == (4, 12, "cpu", "float32")
    assert found["speedup"] == {"original": 1.0, "eckart": 1.5}
    assert model.training


# -- the command -------------------------------------------------------------------------------------------------


def test_the_command_prints_writes_and_draws(clock, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model = LLAMA.model()
    model.save_pretrained(tmp_path / "dense")
    clock |= {"original": 3.0, "small": 2.0}
    small = tmp_path / "small"
    model.save_pretrained(small)
    with pytest.raises(SystemExit) as left:
        app(
            f"bench {small} --against {tmp_path / 'dense'} --batch-sizes 1,2 --lengths 4 --device cpu "
            f"--json {tmp_path / 'found.json'} --plot {tmp_path / 'found.svg'}".split()
        )
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for words in ("prefill", "decode", "2 x 4", "1.50", "original int8", "feed-forward", "1.50 times as fast"):
        assert words in shown
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["written_by"] == "eckart"
    picture = (tmp_path / "found.svg").read_text()
    assert picture.count("<svg") == 1
    for words in ("small", "1.50", "2 x 4", "feed-forward", "prefill", "speed-up over the original"):
        assert f"<!-- {words}" in picture


def test_the_table_says_what_was_measured():
    from eckart.report.speed import render_bench
    from eckart.report.words import to_plain_text

    def row(model, seconds, **more):
        timing = {"median": seconds, "lower": seconds / 2, "upper": seconds * 2, "turns": 3}
        size = {"phase": "forward", "batch": 2, "length": 8, "mode": "eager", "model": model, "seconds": timing}
        return {**size, "tokens_per_second": 16 / seconds, "peak_bytes": None, "speedup": None, "reached": None, **more}

    facts = {"dtype": "float32", "factored": 0, "held_bytes": 2_000_000, "file_bytes": None, "load_seconds": None}
    found = {
        "device": "cpu", "device_name": "a processor", "threads": 2, "torch": "2", "clock": "wall",
        "models": [
            {"name": "original", **facts},
            {"name": "small", **facts, "factored": 7, "file_bytes": 1_500_000, "load_seconds": 0.25},
        ],
        "rows": [
            row("original", 0.004),
            row("small", 0.002, speedup=2.0, allowed=2.5, reached=0.8, peak_bytes=3_000_000),
            row("small", 0.4, mode="compiled"),
            row("original", 0.02, batch=4),
        ],
        "shares": [
            {"phase": "forward", "batch": 2, "length": 8, "model": "original", "shares": {"norms": 0.25, "other": 0.75}}
        ],
        "verdict": ["forward: a sentence."], "notes": ["one thing"],
    }  # fmt: skip
    lines = [line.split() for line in to_plain_text(render_bench(found), 140).splitlines()]
    assert ["cpu", "(a", "processor),", "2", "threads,", "torch", "2"] in lines
    assert ["original", "float32", "2.00", "MB"] in lines
    assert ["small", "float32", "7", "2.00", "MB", "1.50", "MB", "0.25"] in lines
    assert ["2", "x", "8", "original", "eager", "4", "2-8", "4.00", "k"] in lines
    assert ["small", "eager", "2", "1-4", "8.00", "k", "2.00", "2.50", "0.80", "3.00", "MB"] in lines
    assert ["small", "compiled", "400", "200-800", "40"] in lines
    assert ["4", "x", "8", "original", "eager", "20", "10-40", "800"] in lines
    assert ["batch", "x", "length", "model", "norms", "other"] in lines
    assert ["forward", "2", "x", "8", "original", "25.0%", "75.0%"] in lines
    assert ["forward:", "a", "sentence."] in lines
    assert ["note:", "one", "thing"] in lines
    found["rows"] = [row("model", 0.004)]
    alone = to_plain_text(render_bench(found), 140)
    assert ["2", "x", "8", "model", "4", "2-8", "4.00", "k"] in [line.split() for line in alone.splitlines()]
    assert "speed-up" not in alone
    assert "torch 2, processor time" in to_plain_text(render_bench({**found, "clock": "processor"}), 140)


@pytest.mark.parametrize("name", ["found.pdf", "nowhere/found.png", "folder.png"])
def test_pictures_that_cannot_be_are_refused_before_anything_is_timed(tmp_path, name, monkeypatch, capsys):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(benches, "bench", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(SystemExit) as left:
        app(["bench", "model", "--plot", str(tmp_path / name)])
    assert left.value.code == 2
    assert "--plot" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["photo.png", "logo.svg"])
def test_only_pictures_of_eckart_are_replaced(tmp_path, name):
    figures = pytest.importorskip("matplotlib.figure")
    from eckart.report.speed_plot import MARK, check_plot

    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"was not drawn by eckart. Choose another name"):
        check_plot(tmp_path / name)
    key = "Software" if name.endswith("png") else "Creator"
    figures.Figure().savefig(tmp_path / name, metadata={key: MARK.decode()})
    check_plot(tmp_path / name)


def test_how_far_a_quartile_moves_a_bar():
    from eckart.report.speed_plot import _change

    seconds = {"lower": 2.0, "median": 4.0, "upper": 5.0}
    assert _change(seconds, "lower") == 1.0
    assert _change(seconds, "upper") == pytest.approx(0.2)


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    from eckart.report.speed_plot import check_plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'eckart\[report\]'"):
        check_plot(tmp_path / "found.png")


# -- latency in other reports ------------------------------------------------------------------------------------


@pytest.fixture
def times(monkeypatch):
    """The first model of a pair takes 3 seconds, the second 2; the shapes of the inputs are written down."""
    from eckart.speed import latency

    shapes: list = []

    def measure(runs, **options):
        hidden = [run() for run in runs.values()]
        assert not any(separate_experts(run.func) for run in runs.values())  # they would be slower than fused ones
        shapes.append((list(runs), hidden[0].logits.shape[:2], {out.logits.dtype for out in hidden}))
        seconds = [Timing(3.0 - i, 3.0 - i, 3.0 - i, 5) for i in range(len(runs))]
        return dict(zip(runs, seconds, strict=True))

    monkeypatch.setattr(latency, "measure_in_turn", measure)
    return shapes


def test_evaluation_times_both_models_on_the_size_that_is_scored(times):
    from eckart.report.scores import render_scores
    from eckart.report.words import to_plain_text

    model = LLAMA.model()
    batches = LLAMA.batches()
    options = {"data": batches, "task": "agreement", "device": "cpu", "baselines": False}
    found = eckart.evaluate(factored(model), model, object(), batch_size=2, max_seq_length=100, **options)
    assert times == [(["original", "eckart"], (2, 64), {torch.float32})]  # no more positions than there are
    shown = to_plain_text(render_scores(found), 140)
    assert "3000.00" in shown
    assert "2000.00" in shown
    assert "1.50x as fast" in shown
    assert "2 x 64 tokens in float32 on cpu, 1 thread" in shown
    without = eckart.evaluate(model, model, object(), latency=False, **options)
    assert without["latency"] is None
    assert "latency" not in to_plain_text(render_scores(without), 140)


def test_compression_times_both_models_where_it_is_asked_for(times, tmp_path):
    model = LLAMA.model()
    batches = LLAMA.batches(rows=3)
    plain = eckart.compress(model, method="svd", keep=0.5)
    assert "latency" not in plain.report
    assert times == []
    result = eckart.compress(model, method="drone", keep=0.5, data=batches, latency=True, dtype="bfloat16")
    assert times == [(["original", "eckart"], (3, 12), {torch.bfloat16})]
    assert result.report["latency"]["speedup"]["eckart"] == 1.5
    assert "latency: 3000.00 ms -> 2000.00 ms, 1.50 times as fast (one forward pass of 3 x 12 tokens" in str(result)
    result.save_pretrained(tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| milliseconds of one forward pass of 3 x 12 tokens in bfloat16" in card
    assert "| 3,000 | 2,000 |" in card or "| 3000 | 2000 |" in card
    random = eckart.compress(model, method="svd", keep=0.5, latency=True)
    assert times[1][:2] == (["original", "eckart"], (8, 64))
    assert random.report["seconds"]["latency"] >= 0


def test_experts_are_timed_as_they_are_stored(times):
    eckart.compress(BY_NAME["mixtral"].model(), method="svd", keep=0.5, targets=["*_proj"], ignore=["*experts*"],
                    latency=True)  # fmt: skip
    assert times[0][:2] == (["original", "eckart"], (8, 64))


@pytest.mark.parametrize(("streaming", "size"), [(True, 1), (False, 2)])
def test_models_larger_than_memory_and_several_processes_are_not_timed(times, streaming, size):
    workspace = SimpleNamespace(streaming=streaming, processes=SimpleNamespace(size=size))
    assert time_models(SimpleNamespace(workspace=workspace), LLAMA.model()) is None
    assert times == []


def test_comparison_has_a_column_of_latency(times):
    from eckart.report.scores import render_comparison
    from eckart.report.words import to_plain_text

    asked = {"methods": ["svd"], "keeps": [0.5]}
    found = eckart.compare(LLAMA.model(), **asked).as_dict()
    shown = to_plain_text(render_comparison(found), 140)
    assert "as fast" in shown
    assert "1.50x" in shown
    assert len(times) == 1
    found = eckart.compare(LLAMA.model(), latency=False, **asked).as_dict()
    assert len(times) == 1
    assert "as fast" not in to_plain_text(render_comparison(found), 140)
