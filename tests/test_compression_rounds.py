"""Several rounds: the statistics of a smaller model choose the ranks of the next, smaller one."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME

import eckart
from eckart.compression.recipe import Recipe
from eckart.compression.rounds import earlier_rounds
from eckart.errors import UsageError

OPTIONS = {"method": "eckart", "keep": 0.4, "form": "lowrank", "target": "none", "refit": False}


@pytest.fixture(scope="module")
def model():
    return BY_NAME["llama"].model()


@pytest.fixture(scope="module")
def batches():
    return BY_NAME["llama"].batches(rows=4, count=4)


@pytest.fixture(scope="module")
def gathered_on():
    """The models that statistics were gathered on, and the result."""
    return []


@pytest.fixture(scope="module")
def result(model, batches, gathered_on):
    from eckart.compression import rounds

    def noting(context, rows, recipe, smaller, weights):
        gathered_on.append(smaller)
        return original(context, rows, recipe, smaller, weights)

    original = rounds.start_calibration
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "start_calibration", noting)
        return eckart.compress(model, data=batches, rounds=3, **OPTIONS)


def test_sizes_go_down_geometrically():
    recipe = Recipe(rounds=3, keep=0.4, calibrate_curves=True, latency=True)
    found = list(earlier_rounds(recipe))
    assert [each.keep for each in found] == [pytest.approx(0.4 ** (1 / 3)), pytest.approx(0.4 ** (2 / 3))]
    assert all(each.rounds == 1 and not each.latency for each in found)
    assert list(earlier_rounds(Recipe(keep=0.4))) == []


def test_statistics_are_gathered_on_smaller_and_smaller_models(model, result, gathered_on):
    name = "model.layers.0.mlp.gate_proj"
    full = torch.linalg.matrix_rank(model.get_submodule(name).weight)
    ranks = [full, *(sum(torch.linalg.matrix_rank(p) for n, p in smaller.named_parameters() if "proj" in n)
                     for smaller in gathered_on)]  # fmt: skip
    assert len(gathered_on) == 2
    assert ranks[2] < ranks[1] < sum(torch.linalg.matrix_rank(p) for n, p in model.named_parameters() if "proj" in n)
    assert [entry["keep"] for entry in result.report["rounds"]] == [0.7368, 0.5429]
    assert all(entry["quality"] for entry in result.report["rounds"])


def test_the_last_round_has_the_size_that_was_asked_for_and_other_ranks(model, batches, result):
    once = eckart.compress(model, data=batches, **OPTIONS)
    assert "rounds" not in once.report
    assert 0.39 < result.report["kept"]["of_sites"] <= 0.4
    assert result.plan.choices != once.plan.choices


def test_the_weights_that_are_factored_are_the_originals(model, batches, monkeypatch):
    """A first round that leaves little of them takes nothing from the second."""

    def first(recipe):
        return [recipe.model_copy(update={"keep": 0.2, "rounds": 1})]

    monkeypatch.setattr("eckart.compression.rounds.earlier_rounds", first)
    options = {**OPTIONS, "keep": 0.9, "allocation": "uniform"}
    found = eckart.compress(model, data=batches, rounds=2, **options)
    assert found.report["rounds"][0]["quality"] != found.report["quality"]
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight.detach()
    left = torch.linalg.svdvals(weight)[int(0.2 * weight.numel() / sum(weight.shape)) :].norm()
    assert (found.model.get_submodule(name).to_dense() - weight).norm() < 0.8 * left


def test_what_has_no_rounds_is_refused(model, batches, tmp_path):
    with pytest.raises(UsageError, match="reads no statistics"):
        eckart.compress(model, rounds=2, method="svd", keep=0.5)
    with pytest.raises(UsageError, match="share the statistics"):
        eckart.compare(model, data=batches, rounds=2, methods=["eckart"], keeps=[0.5])
    with pytest.raises(UsageError, match="Ask for --keep"):
        eckart.compress(model, data=batches, rounds=2, max_loss="1%")
