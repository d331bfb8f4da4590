"""MoDeGPT: feed-forward layers lose the neurons of least ridge leverage, the other weights are factored."""

from __future__ import annotations

import pytest
import torch
from problems import close, normal
from tiny import llama

import eckart
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.linalg import Metric, Problem, slice_by_leverage
from eckart.linalg.slice import LEVERAGE_RIDGE
from eckart.methods import METHODS


def correlated(neurons: int = 9) -> tuple[Problem, torch.Tensor]:
    active = (normal(60, neurons) @ normal(neurons, neurons, seed=1)).clamp_min(0) * torch.logspace(-2, 0, neurons)
    gram = active.mT @ active
    return Problem(normal(5, neurons, seed=2), right=Metric(full=gram, scale=1 / 60)), gram / 60


def test_the_order_is_that_of_the_ridge_leverage_scores_and_corrections_are_the_best_ones():
    problem, gram = correlated()
    ridge = LEVERAGE_RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    scores = (gram @ torch.linalg.inv(gram + ridge)).diagonal()
    solved = slice_by_leverage(problem)
    assert solved.order.tolist() == scores.argsort(descending=True).tolist()
    for count in (1, 4, 9):
        kept, weight = solved.corrected(count)
        assert sorted(solved.order[:count].tolist()) == kept.tolist()
        expected = problem.target @ gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept])
        close(weight, expected, 1e-6)


def test_what_reads_the_neurons_does_not_matter_to_the_order():
    problem, _ = correlated()
    other = Problem(problem.target * torch.logspace(3, -3, 9), right=problem.right)
    assert torch.equal(slice_by_leverage(problem).order, slice_by_leverage(other).order)


def test_neurons_that_never_fire_are_no_error():
    silent = Problem(normal(3, 4), right=Metric(full=torch.zeros(4, 4, dtype=torch.float64)))
    assert slice_by_leverage(silent).curve.tolist() == [0] * 5


def test_only_where_no_form_is_named():
    settings = Settings.of(METHODS["modegpt"], Recipe())
    assert (settings.form, settings.rest, settings.allocation) == ("sliced", "lowrank", "uniform")
    settings = Settings.of(METHODS["modegpt"], Recipe(form="lowrank"))
    assert (settings.form, settings.slices) == ("lowrank", False)


@pytest.fixture(scope="module")
def models():
    model = llama(num_hidden_layers=1)
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 64, (2, 24))} for _ in range(3)]
    made = [
        eckart.compress(model, data=batches, method=name, form=form, keep=0.6, target="none", refit=False)
        for name, form in (("modegpt", None), ("drone", "sliced"))
    ]
    return batches, model, *made


def test_feed_forward_layers_are_sliced_and_attention_is_factored(models):
    result = models[2]
    choices = {name.rpartition(".")[2]: choice for name, choice in result.plan.choices.items()}
    assert {choices[name].form for name in ("gate_proj", "up_proj", "down_proj")} == {"sliced"}
    assert {choices[name].form for name in ("q_proj", "k_proj", "v_proj", "o_proj")} == {"lowrank"}
    assert choices["down_proj"].rank == int(0.6 * 48)
    assert result.report["kept"]["of_sites"] <= 0.6


def test_its_neurons_are_others_than_those_that_cost_least(models):
    _, model, by_leverage, by_cost = models
    up = "model.layers.0.mlp.up_proj"
    original = model.get_submodule(up).weight
    kept = [
        {i for i, row in enumerate(original) if (result.model.get_submodule(up).weight == row).all(1).any()}
        for result in (by_leverage, by_cost)
    ]
    assert len(kept[0]) == len(kept[1]) == int(0.6 * 48)
    assert kept[0] != kept[1]
