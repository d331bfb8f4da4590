"""Every family of models: factored, published, loaded again, and its statistics against ones made by hand."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import loading
import pytest
import torch
import transformers
from architectures import BY_NAME, ZOO, Architecture, Inputs, output
from loading import Job
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import eckart
from eckart.calibration import Calibration, calibrate
from eckart.data import Batch, load_data
from eckart.forms import FactoredLinear
from eckart.model import find_sites, with_separate_experts
from eckart.moments import Moments, gather, generator, shared_inputs

# One of those that differ in a head or an option alone.
ALIKE = {"bert-mlm", "roberta", "deberta-apart", "llama", "qwen3"}
NAMES = [architecture.name for architecture in ZOO if architecture.name not in ALIKE]
EVERYTHING = frozenset({"gram", "absolute", "gradients", "fisher"})


@dataclass
class Made:
    """One model of the zoo, and what became of it."""

    kind: Architecture
    model: PreTrainedModel
    batches: list[Inputs]
    plain: eckart.Result  # method "svd", low-rank, uniform
    best: eckart.Result  # method "eckart", pivoted, allocated


@cache
def made(name: str) -> Made:
    kind = BY_NAME[name]
    model, batches = kind.model(), kind.batches()
    plain = eckart.compress(model, method="svd", keep=0.5, allocation="uniform")
    # One batch leaves none to hold out and measure on: agreement knows no measure for single scores yet.
    data = batches[:1] if name == "bert-regression" else batches
    return Made(kind, model, batches, plain, eckart.compress(model, data=data, keep=0.5))


def forms(model: nn.Module) -> dict[str, FactoredLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


# -- a) factoring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_svd_factors_the_sites_of_every_family(name):
    it = made(name)
    chosen = find_sites(with_separate_experts(it.model)).chosen
    factored = forms(it.plain.model)
    assert set(factored) <= {site.name for site in chosen}
    assert len(factored) >= 0.9 * len(chosen) > 0
    assert 0.35 < it.plain.report["kept"]["of_sites"] <= 0.5
    for batch in it.batches:
        before, after = output(it.model, batch), output(it.plain.model, batch)
        assert before.shape == after.shape
        assert torch.isfinite(after).all()
        assert (before - after).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_the_default_method_runs_on_every_family(name):
    it = made(name)
    assert it.best.report["method"] == "eckart"
    assert it.best.report["allocation"] == "loss"
    assert it.best.report["kept"]["of_sites"] <= 0.5
    changed = [name for name, choice in it.best.plan.choices.items() if choice.form != "dense"]
    assert len(changed) >= 0.5 * len(find_sites(with_separate_experts(it.model)).chosen)
    rows = [row for row in it.best.report["sites"] if row["form"] == "sliced"]
    assert all(row["rank"] < row["full_rank"] for row in rows)  # of its own neurons
    after = output(it.best.model, it.batches[0])
    assert torch.isfinite(after).all()
    assert not torch.equal(after, output(it.model, it.batches[0]))
    left = {row["site"] for row in it.best.report["sites"] if "left_dense" in row}
    for site in left:
        assert any(site in note for note in it.best.report["notes"]), f"{site} is left dense without a word"
    expected = {"bert": ["pooler.dense"], "mamba": [f"backbone.layers.{i}.mixer.dt_proj" for i in (0, 1)]}
    assert sorted(left) == expected.get(name, [])


@pytest.mark.parametrize(("name", "method"), [("gpt2", "drone"), ("t5", "fwsvd"), ("vit", "drone")])
def test_other_methods_run_on_the_main_families(name, method):
    it = made(name)
    result = eckart.compress(it.model, data=it.batches, method=method, keep=0.5)
    after = output(result.model, it.batches[0])
    assert torch.isfinite(after).all()
    assert not torch.equal(after, output(it.plain.model, it.batches[0]))
    assert result.report["kept"]["of_sites"] <= 0.5


def test_the_original_and_the_random_state_are_left_as_they_were():
    kind = BY_NAME["gpt2"]
    model, batches = kind.model(), kind.batches()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    result = eckart.compress(model, data=batches, keep=0.5)
    eckart.densify(result.model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- b) publishing and loading -----------------------------------------------------------------------------


def in_half(inputs: Inputs) -> Inputs:
    return {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}


def cast_parameters(model: PreTrainedModel) -> PreTrainedModel:
    """The model in bfloat16 as `from_pretrained` makes it: rotary tables, which are not stored, stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


PLAIN = ["bert", "gpt2", "llama-tied", "t5", "mixtral"]
HALF = [
    *((name, "cast") for name in ("gpt2", "llama-tied", "t5", "vit")),
    *((name, "stored") for name in ("llama-tied", "t5")),
    *((name, "asked") for name in ("bert-classes", "gpt2")),
]
FRESH = ["bert-plain", "llama-tied-best", "t5-cast"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Publish the whole matrix, load some in ONE fresh process, the others (whose imports take long) in this one."""
    folder = tmp_path_factory.mktemp("matrix")
    jobs: dict[str, Job] = {}

    def job(key: str, model: PreTrainedModel, inputs: Inputs, where: Path, auto: str, dtype: str | None) -> None:
        state = {name: value.clone() for name, value in model.state_dict().items()}  # tied ones apart
        save_file(state, folder / f"{key}.saved")
        save_file({"output": output(model, inputs).contiguous()}, folder / f"{key}.expected")
        save_file(inputs, folder / f"{key}.inputs")
        jobs[key] = str(where), auto, dtype, str(folder / f"{key}.inputs")

    for which, names in (("plain", PLAIN), ("best", NAMES)):
        for name in names:
            it, key = made(name), f"{name}-{which}"
            model = getattr(it, which).model
            model.save_pretrained(folder / key)
            job(key, model, it.batches[0], folder / key, it.kind.auto, None)
    for name, how in HALF:
        it, key = made(name), f"{name}-{how}"
        inputs = in_half(it.batches[0])
        if how == "cast":
            cast = cast_parameters(copy.deepcopy(it.best.model))
            job(key, cast, inputs, folder / f"{name}-best", it.kind.auto, "bfloat16")
            continue
        if how == "stored":
            result = eckart.compress(cast_parameters(it.kind.model()), data=it.batches, keep=0.5)
        else:
            result = eckart.compress(it.model, method="svd", keep=0.5, dtype="bfloat16")
        result.save_pretrained(folder / key)
        job(key, result.model, inputs, folder / key, it.kind.auto, None)
    (folder / "jobs.json").write_text(json.dumps({key: jobs[key] for key in FRESH}))
    subprocess.run(
        [sys.executable, "-W", "ignore", loading.__file__, folder / "jobs.json", folder / "answers.json"],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    here = {key: loading.load_and_compare(key, found) for key, found in jobs.items() if key not in FRESH}
    return here | json.loads((folder / "answers.json").read_text())


@pytest.mark.parametrize(("name", "which"), [*((name, "plain") for name in PLAIN), *((name, "best") for name in NAMES)])
def test_what_was_saved_is_loaded_bit_for_bit(name, which, loaded):
    result = getattr(made(name), which)
    assert loaded[f"{name}-{which}"] == {
        "missing": [],
        "unexpected": [],
        "mismatched": [],
        "different": [],
        "dtype": "torch.float32",
        "expected_dtype": "torch.float32",
        "equal": True,
        "forms": len(forms(result.model)),
    }


@pytest.mark.parametrize(("name", "how"), HALF)
def test_half_precision_survives_saving_and_loading(name, how, loaded):
    answer = loaded[f"{name}-{how}"]
    assert answer["dtype"] == answer["expected_dtype"] == "torch.bfloat16"
    assert answer["equal"]
    assert answer["missing"] == answer["unexpected"] == answer["mismatched"] == answer["different"] == []


def test_a_model_that_keeps_modules_in_float32_keeps_their_factors_too(tmp_path):
    """T5 keeps `wo` in float32 when the rest is float16, and asks `wo.weight` for its dtype at every step."""
    it = made("t5")
    it.best.model.save_pretrained(tmp_path / "t5")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5", dtype=torch.float16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept
    assert all(".wo." in name for name in kept)
    assert torch.isfinite(output(model, it.batches[0])).all()


# -- c) nothing without a word -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_module_that_holds_a_matrix_is_a_site_or_skipped_with_a_reason(name):
    model = with_separate_experts(BY_NAME[name].model())
    sites = find_sites(model)
    chosen = {site.name for site in sites.chosen}
    assert not chosen & set(sites.skipped)
    holders = {n for n, m in model.named_modules() if any(p.dim() >= 2 for p in m.parameters(recurse=False))}
    assert chosen | set(sites.skipped) == holders
    assert all(reason.strip() for reason in sites.skipped.values())
    assert made(name).plain.report["skipped"] == sites.skipped
    # Nothing of the weight's shape is lost: the sites and the skipped hold every matrix element of the model.
    seen = {id(p) for n in holders for p in model.get_submodule(n).parameters(recurse=False)}
    assert all(id(p) in seen for p in model.parameters() if p.dim() >= 2)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_are_sites_once_they_are_apart_and_routers_are_skipped(name):
    model = BY_NAME[name].model()
    fused, apart = find_sites(model), find_sites(with_separate_experts(model))
    for layer in (0, 1):
        assert "fused experts" in fused.skipped[f"model.layers.{layer}.mlp.experts"]
        assert "Router" in apart.skipped[f"model.layers.{layer}.mlp.gate"]
    # k_proj of the second model has as many outputs as there are experts, and is not a router for that.
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {site.name.rsplit(".", 1)[1] for site in fused.chosen} == attention
    assert {site.name.rsplit(".", 1)[1] for site in apart.chosen} == attention | {"up", "down"}


def test_shapes_and_orientation_are_those_of_the_products():
    conv = {site.name: site for site in find_sites(BY_NAME["gpt2"].model()).chosen}
    attention = conv["transformer.h.0.attn.c_attn"]
    assert (attention.source, attention.in_features, attention.out_features) == ("conv1d", 32, 96)
    fused = {site.name: site for site in find_sites(BY_NAME["phi3"].model()).chosen}
    assert fused["model.layers.0.self_attn.qkv_proj"].shape == (64, 32)
    assert fused["model.layers.0.mlp.gate_up_proj"].shape == (96, 32)


# -- d) groups ---------------------------------------------------------------------------------------------


def calibrated(
    kind: Architecture,
    needs: frozenset[str],
    batches: list[Inputs] | None = None,
    model: PreTrainedModel | None = None,
    **options,
) -> Calibration:
    model = with_separate_experts(model if model is not None else kind.model())
    data = load_data(batches if batches is not None else kind.batches(), model=model)
    return calibrate(model, [site.name for site in find_sites(model).chosen], data, needs=needs, **options)


def groups_of(name: str) -> set[frozenset[str]]:
    return {frozenset(members) for members in calibrated(BY_NAME[name], frozenset({"gram"})).groups.values()}


def named(prefix: str, *names: str) -> frozenset[str]:
    return frozenset(f"{prefix}.{name}" for name in names)


def test_weights_that_read_the_same_tensor_share_one_gram():
    expected = set()
    for i in (0, 1):
        layer = f"model.layers.{i}"
        expected |= {
            named(f"{layer}.self_attn", "q_proj", "k_proj", "v_proj"),
            named(f"{layer}.self_attn", "o_proj"),
            named(f"{layer}.mlp", "gate_proj", "up_proj"),
            named(f"{layer}.mlp", "down_proj"),
        }
    assert groups_of("llama") == expected
    found = calibrated(BY_NAME["llama"], EVERYTHING).moments
    q, k, gate = (found[f"model.layers.0.{n}"] for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"))
    assert q["gram"] is k["gram"]
    assert q["gram"] is not gate["gram"]
    assert q["gradients"] is not k["gradients"]
    assert q["fisher"] is not k["fisher"]


def test_groups_of_an_encoder_and_of_a_shared_layer():
    found = groups_of("bert-classes")
    assert named("bert.encoder.layer.1.attention.self", "query", "key", "value") in found
    assert named("bert.encoder.layer.1.intermediate", "dense") in found
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    assert named(f"{layer}.attention", "query", "key", "value") in groups_of("albert")


def test_cross_attention_of_every_decoder_layer_reads_the_one_encoder_output():
    t5 = {f"decoder.block.{i}.layer.1.EncDecAttention.{n}" for i in (0, 1) for n in "kv"}
    bart = {f"model.decoder.layers.{i}.encoder_attn.{n}_proj" for i in (0, 1) for n in "kv"}
    for name, members in (("t5", t5), ("bart", bart)):
        found = groups_of(name)
        assert frozenset(members) in found
    assert named("decoder.block.0.layer.0.SelfAttention", "q", "k", "v") in groups_of("t5")
    assert named("decoder.block.0.layer.1.EncDecAttention", "q") in groups_of("t5")


def test_relative_positions_split_a_group():
    """With share_att_key, query and key also project relative positions, which value never sees."""
    found = groups_of("deberta")
    prefix = "deberta.encoder.layer.0.attention.self"
    assert named(prefix, "query_proj", "key_proj") in found
    assert named(prefix, "value_proj") in found


# -- e) moments against ones made by hand ------------------------------------------------------------------


def captured(model: PreTrainedModel, names: list[str], inputs: Inputs) -> dict[str, list[Tensor]]:
    """What each module was given in one plain forward pass, call by call."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen[name].append((args[0] if args else next(iter(kwargs.values()))).detach().clone())

        return note

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in names]
    output(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def real(name: str, x: Tensor, inputs: Inputs) -> Tensor:
    """The real tokens of an input, by what we KNOW of the model and the name of the module."""
    if "pixel_values" in inputs:
        return x.reshape(-1, x.shape[-1])
    crosses = "EncDecAttention.k" in name or "EncDecAttention.v" in name
    crosses |= "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
    of_decoder = "decoder_attention_mask" in inputs and "decoder." in name and not crosses
    mask = inputs.get("decoder_attention_mask" if of_decoder else "attention_mask")
    if mask is None:
        mask = torch.ones_like(inputs["input_ids"])
    if x.dim() == 2 and len(x) == len(mask):  # one row a text: a pooler
        return x
    if x.dim() == 2:  # OPT flattens
        x = x.reshape(*mask.shape, -1)
    if "transformer.layer" in name and ".ff." in name:  # XLNet: time first
        x = x.transpose(0, 1)
    assert x.shape[:2] == mask.shape
    rows = [x[b, t] for b in range(len(mask)) for t in range(mask.shape[1]) if mask[b, t]]
    return torch.stack(rows)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    scale = expected.double().abs().max()
    assert scale > 0
    assert (got.double() - expected.double()).abs().max() <= tolerance * scale


GRAMS = [
    "bert-classes",
    "modernbert",
    "albert",
    "xlnet",
    "bloom",
    "gpt2",
    "opt",
    "t5",
    "bart",
    "vit",
]


@pytest.mark.parametrize("name", GRAMS)
def test_grams_are_those_of_the_captured_inputs_without_padding(name):
    kind = BY_NAME[name]
    model, batches = kind.model(), kind.batches()
    moments = calibrated(kind, frozenset({"gram", "absolute"}), batches, model).moments
    rows: dict[str, list[Tensor]] = {site: [] for site in moments}
    for batch in batches:
        for site, calls in captured(model, list(moments), batch).items():
            if "pos_" in site:  # projects relative positions: all of them, once an example
                rows[site] += [calls[0].reshape(-1, calls[0].shape[-1])] * len(batch["input_ids"])
            else:
                rows[site] += [real(site, x, batch) for x in calls]
    for site, parts in rows.items():
        all_rows = torch.cat(parts).double()
        entry = moments[site]
        assert entry.tokens == len(all_rows), site
        close(entry["gram"].mean, all_rows.mT @ all_rows / len(all_rows))
        close(entry.mean, all_rows.mean(0))
        close(entry["absolute"].mean, all_rows.abs().mean(0))
        assert entry.sequences == sum(len(next(iter(b.values()))) for b in batches)


def test_an_encoder_decoder_with_sides_of_equal_length_is_not_confused():
    kind = BY_NAME["bart"]
    model, batches = kind.model(), kind.batches()
    for batch in batches:  # the decoder reads texts as long as the encoder's, padded otherwise
        batch["decoder_input_ids"] = batch["input_ids"].flip(0)
        batch["decoder_attention_mask"] = batch["attention_mask"].flip(0)
    moments = calibrated(kind, frozenset({"gram"}), batches, model).moments
    for site in ("decoder.layers.0.encoder_attn.k_proj", "decoder.layers.1.fc1", "encoder.layers.1.fc1"):
        rows = [real(site, captured(model, [f"model.{site}"], b)[f"model.{site}"][0], b).double() for b in batches]
        close(moments[f"model.{site}"]["gram"].mean, torch.cat(rows).mT @ torch.cat(rows) / len(torch.cat(rows)))


def test_shared_position_tables_count_once_an_example_and_carry_no_mask():
    """DeBERTa: as many relative positions as tokens in a padded row, which must not be masked with it."""
    kind = BY_NAME["deberta"]
    model, batches = kind.model(), kind.batches()
    site = "deberta.encoder.layer.0.attention.self.query_proj"
    moments = calibrated(kind, frozenset({"gram"}), batches, model).moments[site]
    rows = []
    for batch in batches:
        texts, positions = captured(model, [site], batch)[site]
        assert positions.shape == (1, 12, 32)
        assert texts.shape[1] == 12
        rows += [real(site, texts, batch), *([positions[0]] * len(texts))]
    every = torch.cat(rows).double()
    assert moments.tokens == len(every)
    close(moments["gram"].mean, every.mT @ every / len(every))


def alone(batch: Inputs) -> Iterator[Inputs]:
    """Each example by itself, its padding cut off."""
    rows = len(next(iter(batch.values())))
    for b in range(rows):
        one = {key: value[b : b + 1] for key, value in batch.items()}
        for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            if mask in one:
                there = one[mask][0].bool()
                one[ids], one[mask] = one[ids][:, there], one[mask][:, there]
        yield one


def drawn_loss(made: transformers.utils.ModelOutput, example: int, length: int, seed: int) -> Tensor:
    """Summed cross-entropy against targets drawn from the output: by hand, one token at a time."""
    logits = made.logits.reshape(-1, made.logits.shape[-1])
    draws = torch.rand(length, 1, generator=generator(seed, example))
    total = logits.new_zeros(())
    for scores, draw in zip(logits, draws, strict=False):
        below = scores.detach().softmax(-1).cumsum(-1)
        target = int((below < draw * below[-1]).sum())
        total = total + functional.cross_entropy(scores[None], torch.tensor([target]))
    return total


def expected_fisher(model: PreTrainedModel, names: list[str], batches: list[Inputs], length: int | None, seed: int):
    """Squared gradients of the weights, sequence by sequence, as autograd gives them; and output gradients."""
    weights = {name: model.get_submodule(name).weight for name in names}
    squares: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    outer: dict[str, list[Tensor]] = {name: [] for name in names}
    example = 0
    for batch in batches:
        for one in alone(batch):
            outputs: list[tuple[str, Tensor]] = []
            handles = [
                model.get_submodule(n).register_forward_hook(
                    lambda _, __, out, n=n, kept=outputs: (out.retain_grad(), kept.append((n, out)))[2:] or None
                )
                for n in names
            ]
            labels = one.get("labels")
            found = model(**{k: v for k, v in one.items() if k != "labels"})
            if labels is not None:
                loss = functional.cross_entropy(found.logits, labels, reduction="sum")
            else:
                loss = drawn_loss(found, example, length or 1, seed)
            gradients = torch.autograd.grad(loss, [*weights.values(), *(out for _, out in outputs)])
            for handle in handles:
                handle.remove()
            for name, gradient in zip(weights, gradients, strict=False):
                flip = isinstance(model.get_submodule(name), Conv1D)
                squares[name] = squares[name] + (gradient.mT if flip else gradient).double() ** 2
            for (name, _), gradient in zip(outputs, gradients[len(weights) :], strict=True):
                outer[name].append(gradient.reshape(-1, gradient.shape[-1]).double())
            example += 1
    return squares, {name: torch.cat(parts) for name, parts in outer.items()}


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("bert-mlm", 12),  # a target a token
        ("bert-classes", None),  # a target a text, and a pooler
        ("albert", 12),  # one weight, two calls
        ("deberta", None),  # one weight, texts and relative positions
        ("deberta-apart", 12),
        ("xlnet", None),  # time first
        ("gpt2", 12),  # Conv1D
        ("opt", 12),
        ("t5", 7),
        ("bart", 7),
        ("vit", None),
    ],
)
def test_gradient_moments_are_those_of_one_sequence_at_a_time(name, length):
    kind = BY_NAME[name]
    model, batches = kind.model(), kind.batches(count=2)
    moments = calibrated(kind, EVERYTHING, batches, model, curvature="sampled", seed=3).moments
    with torch.enable_grad():
        squares, outer = expected_fisher(model, list(moments), batches, length, seed=3)
    for site, entry in moments.items():
        rows = outer[site]
        assert entry["gradients"].count == len(rows), site
        if rows.abs().max() < 1e-6:  # a key's bias direction and the like: all but zero, in both
            continue
        close(entry["gradients"].mean, rows.mT @ rows / len(rows), 1e-3)
        assert entry["fisher"].sequences == sum(len(next(iter(b.values()))) for b in batches)
        close(entry["fisher"].rows, squares[site].sum(1), 1e-3)
        close(entry["fisher"].columns, squares[site].sum(0), 1e-3)


def test_own_labels_give_the_empirical_fisher():
    kind = BY_NAME["bert-classes"]
    model, batches = kind.model(), kind.batches(count=2)
    for number, batch in enumerate(batches):
        batch["labels"] = torch.tensor([0, 2, 1, number])
    found = calibrated(kind, EVERYTHING, batches, model)
    assert found.curvature == "labels"
    with torch.enable_grad():
        squares, outer = expected_fisher(model, list(found.moments), batches, None, seed=0)
    for site, entry in found.moments.items():
        close(entry["fisher"].rows, squares[site].sum(1), 1e-3)
        close(entry["gradients"].mean, outer[site].mT @ outer[site] / len(outer[site]), 1e-3)


class Flattening(nn.Module):
    """A model that hands its layers (batch x time, features), as old OPT did."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(96, 16)
        self.inner = nn.Linear(16, 24)
        self.out = nn.Linear(24, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        flat = self.out(self.inner(x.reshape(-1, 16)).tanh())
        return flat.reshape(x.shape)


def test_flattened_layers_are_unflattened():
    model, batches = Flattening(), BY_NAME["bert"].batches(count=2)
    data = load_data(batches)

    def loss(inputs: Inputs) -> Tensor:
        made = model(inputs["input_ids"], inputs["attention_mask"])
        return (made.sin() * inputs["attention_mask"][..., None]).sum()

    groups = shared_inputs(model, ["inner", "out"], lambda: loss(batches[0]))
    moments = gather(model, groups, data.batches, lambda batch: loss(batch.inputs), needs=EVERYTHING)
    squares: dict[str, Tensor] = {}
    rows = []
    for batch in batches:
        for one in alone(batch):
            gradients = torch.autograd.grad(loss(one), [model.inner.weight, model.out.weight])
            for name, gradient in zip(("inner", "out"), gradients, strict=True):
                squares[name] = squares.get(name, 0) + gradient.double() ** 2
            rows.append(model.embed(one["input_ids"]).detach()[0].double())
    for name, square in squares.items():
        close(moments[name]["fisher"].rows, square.sum(1))
        close(moments[name]["fisher"].columns, square.sum(0))
    every = torch.cat(rows)
    assert moments["inner"].tokens == len(every)
    close(moments["inner"]["gram"].mean, every.mT @ every / len(every))


def same(one: Moments, other: Moments, tolerance: float) -> None:
    assert one.tokens == other.tokens
    assert one.sequences == other.sequences
    close(one["gram"].mean, other["gram"].mean, tolerance)
    close(one["absolute"].mean, other["absolute"].mean, tolerance)
    assert one["gradients"].count == other["gradients"].count
    close(one["gradients"].mean, other["gradients"].mean, tolerance)
    close(one["fisher"].rows, other["fisher"].rows, tolerance)
    close(one["fisher"].columns, other["fisher"].columns, tolerance)


@pytest.mark.parametrize("name", ["bert-mlm", "bert-regression", "deberta", "albert", "t5"])
def test_statistics_do_not_depend_on_the_size_of_batches(name):
    kind = BY_NAME[name]
    model, batches = kind.model(), kind.batches(rows=4, count=2)
    whole = calibrated(kind, EVERYTHING, batches, model).moments
    for size in (2, 1):
        parts = [{k: v[i : i + size] for k, v in b.items()} for b in batches for i in range(0, 4, size)]
        cut = calibrated(kind, EVERYTHING, parts, model).moments
        assert list(cut) == list(whole)
        for site in whole:
            same(cut[site], whole[site], 1e-3)


def test_draws_follow_the_example_not_its_place_in_a_batch():
    kind = BY_NAME["bert-mlm"]
    model = kind.model()
    batch = load_data(kind.batches(count=1), model=model).batches[0]
    names = [site.name for site in find_sites(model).chosen]
    site = names[-1]

    def moments(batches: list[Batch], seed: int = 0) -> Tensor:
        data = load_data(batches, model=model)
        entry = calibrate(model, names, data, needs=EVERYTHING, seed=seed).moments[site]
        return entry["gradients"].mean

    order = [2, 0, 3, 1]
    shuffled = Batch({k: v[order] for k, v in batch.inputs.items()}, tuple(order))
    renamed = Batch(batch.inputs, tuple(order))
    close(moments([shuffled]), moments([batch]), 1e-4)
    assert (moments([renamed]) - moments([batch])).abs().max() > 1e-2 * moments([batch]).abs().max()
    assert (moments([batch], seed=1) - moments([batch])).abs().max() > 1e-2 * moments([batch]).abs().max()


# -- g) back to ordinary modules ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "which"),
    [("deberta", "plain"), ("albert", "best"), ("gpt2", "plain"), ("gpt2", "best"), ("llama-tied", "best"),
     ("t5", "plain"), ("mamba", "best")],
)  # fmt: skip
def test_densify_gives_ordinary_modules_back(name, which, tmp_path):
    it = made(name)
    factored = getattr(it, which).model
    dense = eckart.densify(copy.deepcopy(factored))
    for (site, old), new in zip(it.model.named_modules(), dense.modules(), strict=True):
        assert type(new) is type(old), site
        for (key, before), after in zip(
            old.named_parameters(recurse=False), new.parameters(recurse=False), strict=True
        ):
            assert before.shape == after.shape, f"{site}.{key}"
            assert before.requires_grad == after.requires_grad
        assert old.training == new.training
    expected = output(factored, it.batches[0])
    close(output(dense, it.batches[0]), expected, 1e-4)

    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    it.model.save_pretrained(tmp_path / "original")
    shapes = [
        {key: tuple(value.shape) for key, value in load_file(tmp_path / folder / "model.safetensors").items()}
        for folder in ("dense", "original")
    ]
    assert shapes[0] == shapes[1]
    auto = getattr(transformers, it.kind.auto)
    loaded, info = auto.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found = loaded.state_dict()
    assert found.keys() == dense.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in dense.state_dict().items())
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()  # mapped from a file they lie anywhere, which shows in products' last bits
    assert torch.equal(output(loaded, it.batches[0]), output(dense, it.batches[0]))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_weight_of_a_factored_module_has_the_orientation_of_the_one_it_replaced(name):
    it = made(name)
    for site, module in {**forms(it.plain.model), **forms(it.best.model)}.items():
        original = it.model.get_submodule(site)
        assert module.weight.shape == original.weight.shape, site
        x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0))
        matrix = module.weight if isinstance(original, Conv1D) else module.weight.mT
        close(module(x).detach(), (x @ matrix + module.bias).detach())
