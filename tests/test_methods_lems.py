"""LEMS: curves scaled by what cuts do, on clipped gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import llama

import eckart
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.errors import UsageError
from eckart.methods import METHODS


def test_its_settings_are_its_own_unless_the_recipe_says_otherwise():
    settings = Settings.of(METHODS["lems"], Recipe())
    assert settings.measures_curves
    assert settings.robust
    assert not Settings.of(METHODS["lems"], Recipe(calibrate_curves=False)).measures_curves
    assert not Settings.of(METHODS["lems"], Recipe(allocation="uniform")).measures_curves
    assert not Settings.of(METHODS["kfac"], Recipe(allocation="loss")).measures_curves
    with pytest.raises(UsageError, match="--calibrate-curves with --allocation uniform"):
        Settings.of(METHODS["lems"], Recipe(allocation="uniform", calibrate_curves=True))


def test_a_model_by_it_says_what_was_measured():
    model = llama(num_hidden_layers=1)
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 64, (1, 24))} for _ in range(6)]
    report = eckart.compress(model, data=batches, method="lems", keep=0.6, target="none").report
    assert len(report["curves"]) > 3
    assert report["kept"]["of_sites"] <= 0.6
