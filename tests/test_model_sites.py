"""Which weights are chosen, which are left alone, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME, output
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import eckart
from eckart.errors import ModelError, NumericalError, UsageError
from eckart.model import find_sites


def chosen(model: nn.Module, **options) -> list[str]:
    return [site.name for site in find_sites(model, **options).chosen]


@pytest.fixture
def llama():
    return BY_NAME["llama"].model()


# -- targets and ignore ------------------------------------------------------------------------------------

LAYERS = ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),  # a whole name
        (["q_proj"], [f"{layer}.self_attn.q_proj" for layer in LAYERS]),  # its end at a dot
        (["mlp.down_proj"], [f"{layer}.mlp.down_proj" for layer in LAYERS]),
        (["*.0.self_attn.[qk]_proj"], [f"{LAYERS[0]}.self_attn.{n}_proj" for n in "qk"]),  # a glob
        ([r".*\.(gate|up)_proj"], [f"{layer}.mlp.{n}_proj" for layer in LAYERS for n in ("gate", "up")]),  # a regex
        ([r"model\.layers\.\d\.self_attn\.o_proj"], [f"{layer}.self_attn.o_proj" for layer in LAYERS]),
        (
            ["o_proj", "model.layers.0.mlp.*"],
            [
                "model.layers.0.self_attn.o_proj",
                *[f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")],
                "model.layers.1.self_attn.o_proj",
            ],
        ),
    ],
)
def test_targets_are_names_ends_globs_and_regular_expressions(llama, patterns, expected):
    assert chosen(llama, targets=patterns) == expected
    everything = chosen(llama)
    assert chosen(llama, ignore=patterns) == [name for name in everything if name not in expected]
    sites = find_sites(llama, targets=patterns)
    assert {n for n, reason in sites.skipped.items() if reason == "not among --targets"} == {*everything} - {*expected}
    sites = find_sites(llama, ignore=patterns)
    assert {n for n, reason in sites.skipped.items() if reason == "named by --ignore"} == {*expected}


def test_the_end_of_a_name_begins_at_a_dot(llama):
    with pytest.raises(UsageError, match="'proj'"):
        find_sites(llama, targets=["proj"])


def test_ignore_wins_over_targets(llama):
    names = chosen(llama, targets=["*.mlp.*"], ignore=["up_proj"])
    assert names == [f"{layer}.mlp.{n}_proj" for layer in LAYERS for n in ("gate", "down")]


@pytest.mark.parametrize("option", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_refused_with_near_misses(llama, option):
    with pytest.raises(UsageError) as refused:
        find_sites(llama, **{option: ["o_proj", "gat_proj"]})
    message = str(refused.value)
    assert f"--{option}" in message
    assert "'gat_proj'" in message
    assert "gate_proj" in message.split("Near misses")[1]
    with pytest.raises(UsageError, match="--" + option):
        eckart.compress(llama, method="svd", keep=0.5, **{option: "no_such_thing"})


def test_a_single_pattern_may_be_a_string(llama):
    result = eckart.compress(llama, method="svd", keep=0.5, targets="q_proj")
    assert list(result.plan.choices) == [f"{layer}.self_attn.q_proj" for layer in LAYERS]


def test_the_rest_of_the_model_is_untouched(llama):
    result = eckart.compress(llama, method="svd", keep=0.5, targets=["q_proj"])
    for name, module in llama.named_modules():
        now = result.model.get_submodule(name)
        if isinstance(module, nn.Linear) and "q_proj" not in name:
            assert torch.equal(now.weight, module.weight)


@pytest.mark.parametrize("pattern", ["lm_head", "embed_tokens"])
def test_what_cannot_be_factored_is_refused_by_name_when_it_alone_is_wanted(llama, pattern):
    with pytest.raises(UsageError, match=pattern) as refused:
        find_sites(llama, targets=[pattern])
    assert "left alone" in str(refused.value)
    assert chosen(llama, targets=[pattern, "q_proj"]) == [f"{layer}.self_attn.q_proj" for layer in LAYERS]


def test_nothing_left_is_refused(llama):
    with pytest.raises(ModelError, match="no weight is left to factor"):
        find_sites(llama, ignore=["*"])
    with pytest.raises(ModelError, match="it has no Linear or Conv1D"):
        find_sites(nn.Sequential(nn.ReLU()))
    with pytest.raises(ModelError, match="embedding, left alone"):
        find_sites(nn.Sequential(nn.Embedding(9, 4)))


def test_a_factored_model_is_refused_with_the_way_forward(llama):
    result = eckart.compress(llama, method="svd", keep=0.5, targets=["q_proj"])
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj is already factored.*densify"):
        eckart.compress(result.model, method="svd", keep=0.5)
    again = eckart.compress(eckart.densify(result.model), method="svd", keep=0.5, targets=["k_proj"])
    assert list(again.plan.choices) == [f"{layer}.self_attn.k_proj" for layer in LAYERS]


def test_densify_refuses_a_model_without_factors(llama):
    with pytest.raises(ModelError, match="nothing to make dense"):
        eckart.densify(llama)


def test_a_quantized_model_is_refused(llama):
    llama.is_quantized = True
    with pytest.raises(ModelError, match="quantized"):
        find_sites(llama)


# -- modules that only look like sites ---------------------------------------------------------------------


class Scaled(nn.Linear):
    """Computes something else than `x W^T + b`."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Logged(nn.Linear):
    """Has its own forward, and computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Grouped(nn.Linear):
    """Block-diagonal: takes other shapes than a Linear of its weight's."""

    def __init__(self) -> None:
        super().__init__(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gi,goi->...go", x.unflatten(-1, (2, 16)), self.weight.unflatten(0, (2, 4))).flatten(-2)


def test_linears_that_compute_something_else_are_skipped_with_the_reason():
    model = nn.ModuleDict(
        {"scaled": Scaled(16, 8), "logged": Logged(16, 8), "grouped": Grouped(), "plain": nn.Linear(16, 8)}
    )
    sites = find_sites(model)
    assert [site.name for site in sites.chosen] == ["logged", "plain"]
    assert "Scaled computes something else" in sites.skipped["scaled"]
    assert "Grouped computes something else" in sites.skipped["grouped"]


def test_multihead_attention_recurrent_and_convolving_layers_are_skipped_with_the_reason():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(16, 4),
            "bilinear": nn.Bilinear(8, 8, 8),
            "lstm": nn.LSTM(16, 16),
            "conv": nn.Conv1d(16, 16, 3),
            "conv1d": Conv1D(8, 16),
            "plain": nn.Linear(16, 8),
        }
    )
    sites = find_sites(model)
    assert {site.name: site.shape for site in sites.chosen} == {"conv1d": (8, 16), "plain": (8, 16)}
    assert "nn.MultiheadAttention" in sites.skipped["attention"]
    assert "bypasses" in sites.skipped["attention.out_proj"]
    assert set(sites.skipped) == {"attention", "attention.out_proj", "bilinear", "lstm", "conv"}


def test_tied_and_tiny_weights_are_skipped_with_the_reason():
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("one", "other", "plain")})
    model["other"].weight = model["one"].weight
    model["narrow"] = nn.Linear(16, 1)
    model["whole"] = nn.Linear(16, 16)
    model["whole"].weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    sites = find_sites(model)
    assert [site.name for site in sites.chosen] == ["plain"]
    assert "tied" in sites.skipped["one"]
    assert "tied" in sites.skipped["other"]
    assert "too small (1 x 16)" in sites.skipped["narrow"]
    assert "int8" in sites.skipped["whole"]


class Mixture(nn.Module):
    """Experts and their router as plain Linears; config names their number."""

    class config:  # noqa: N801 - stands for a model's config
        num_experts = 8

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(16, 8)  # as many outputs as there are experts, by chance
        self.mlp = nn.Module()
        self.mlp.gate = nn.Linear(16, 8, bias=False)
        self.mlp.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(8)])
        self.deep = nn.Module()
        self.deep.router = nn.Module()
        self.deep.router.classifier = nn.Linear(16, 8, bias=False)
        self.deep.experts = nn.ModuleDict({"expert_0": nn.Linear(16, 16)})


def test_a_router_is_known_by_its_outputs_and_its_neighbors():
    sites = find_sites(Mixture())
    assert {n for n, reason in sites.skipped.items() if "router" in reason} == {"mlp.gate", "deep.router.classifier"}
    names = [site.name for site in sites.chosen]
    assert names == ["k_proj", *[f"mlp.experts.{i}" for i in range(8)], "deep.experts.expert_0"]


def test_kinds_drop_layer_numbers(llama):
    kinds = {site.kind for site in find_sites(llama).chosen}
    assert kinds == {
        *[f"model.layers.*.self_attn.{n}_proj" for n in "qkvo"],
        *[f"model.layers.*.mlp.{n}_proj" for n in ("gate", "up", "down")],
    }


# -- bad numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_with_its_count(llama, value):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[3, :5] = value
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*\b5\b"):
        eckart.compress(llama, method="svd", keep=0.5)


def test_activations_that_are_not_finite_are_named_with_site_and_batch(llama):
    batches = BY_NAME["llama"].batches()
    with torch.no_grad():
        llama.model.layers[0].input_layernorm.weight.fill_(3e38)  # finite itself, but not what it gives
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.self_attn\.q_proj, batch 0"):
        eckart.compress(llama, data=batches, method="drone", keep=0.5)


# -- sites that no data reaches ----------------------------------------------------------------------------


def test_a_site_that_is_never_reached_is_left_dense_and_named():
    kind = BY_NAME["bert"]
    model = kind.model()
    model.encoder.layer[1].attention.self.spare = nn.Linear(32, 32)
    site = "encoder.layer.1.attention.self.spare"
    for method in ("drone", "eckart"):
        result = eckart.compress(model, data=kind.batches(), method=method, keep=0.5)
        assert type(result.model.get_submodule(site)) is nn.Linear
        assert result.plan.choices[site].form == "dense"
        assert any(site in note and "sites, " in note and " dense, and" in note for note in result.report["notes"])
        row = next(row for row in result.report["sites"] if row["site"] == site)
        assert "no token" in row["left_dense"]
        assert torch.isfinite(output(result.model, kind.batches()[0])).all()


def test_data_that_reaches_none_of_the_sites_is_refused():
    kind = BY_NAME["bert"]
    model = kind.model()
    model.spare = nn.Linear(32, 32)
    with pytest.raises(ModelError, match="reached none of the chosen sites"):
        eckart.compress(model, data=kind.batches(), method="drone", keep=0.5, targets=["spare"])


def test_an_output_that_nothing_depends_on_is_left_dense_and_named():
    kind = BY_NAME["bert"]
    result = eckart.compress(kind.model(), data=kind.batches(), method="kfac", keep=0.5)
    assert result.plan.choices["pooler.dense"].form == "dense"
    assert any("pooler.dense" in note and "does not depend" in note for note in result.report["notes"])
