"""Gradients of which no token decides alone: clipped, and without the ends of a sequence."""

from __future__ import annotations

import pytest
import torch
from problems import LAYERS, close, normal
from tiny import llama
from torch import Tensor
from torch.nn import functional

import eckart
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.errors import UsageError
from eckart.linalg import Metric
from eckart.methods import METHODS
from eckart.methods.kfac import GRADIENT_SHRINKAGE, robust_metric
from eckart.moments.robust_gradients import RobustGradientGram, in_the_middle

N = 4


def gathered(inputs: Tensor, gradients: Tensor) -> RobustGradientGram:
    statistic = RobustGradientGram()
    statistic.update(inputs, gradients)
    return statistic


def of_norms(*norms: float) -> tuple[Tensor, Tensor]:
    """A sequence of tokens with gradients of these norms, in random directions."""
    directions = functional.normalize(normal(1, len(norms), 3, dtype=torch.float32), dim=-1)
    return torch.ones(1, len(norms), N), directions * torch.tensor(norms)[:, None]


def test_norms_are_kept_between_a_tenth_and_ten_times_their_mean():
    middle = [1000.0, 0.5, 0.0, *[1.0] * 13]
    x, g = of_norms(1e6, 1e6, *middle, 1e6, 1e6)
    mean = sum(middle) / len(middle)
    clipped = torch.tensor([10 * mean, 0.1 * mean, 0.0, *[0.1 * mean] * 13])
    expected = functional.normalize(g[0, 2:18], dim=-1) * clipped[:, None]
    found = gathered(x, g)
    assert found.count == 16
    close(found.metric.matrix * 16, (expected.mT @ expected).double(), 1e-6)


def test_the_first_and_the_last_eighth_of_a_sequence_are_left_out_wherever_its_padding_is():
    x, g = torch.ones(1, 17, N), normal(1, 17, 3, dtype=torch.float32)
    inside, found = g[0, 2:15], gathered(x, g)  # none of these has to be clipped
    assert found.count == 13
    close(found.metric.matrix * 13, (inside.mT @ inside).double(), 1e-6)
    for padding in ((0, 0, 0, 6), (0, 0, 6, 0)):
        padded = gathered(functional.pad(x, padding), functional.pad(g, padding))
        assert padded.count == 13
        close(padded.metric.matrix, found.metric.matrix, 1e-6)


def test_short_sequences_lose_no_token():
    real = torch.tensor([[True] * 7 + [False] * 9, [True] * 16])
    assert in_the_middle(real).sum(1).tolist() == [7, 12]


def test_the_metric_reads_them():
    moments = LAYERS["tall"].moments
    moments["robust-gradients"].gram *= 3
    problem = robust_metric(LAYERS["tall"].weight, moments)
    expected = Metric(full=3 * moments["gradients"].mean).shrunk(GRADIENT_SHRINKAGE)
    close(problem.left.matrix, expected.matrix, 1e-9)


@pytest.mark.parametrize(("method", "asked", "robust"), [
    ("kfac", None, False), ("kfac", True, True), ("lems", None, True), ("lems", False, False), ("drone", True, True),
])  # fmt: skip
def test_who_reads_clipped_gradients(method, asked, robust):
    recipe = Recipe(robust_gradients=asked, **({"allocation": "loss"} if method == "drone" else {}))
    settings = Settings.of(METHODS[method], recipe)
    assert settings.robust is robust
    assert settings.loss_metric is (robust_metric if robust else METHODS["kfac"].metric)
    assert ("robust-gradients" in settings.needs()) is robust
    assert ("gradients" in settings.needs()) is not robust
    if method != "drone":
        assert settings.method.metric is settings.loss_metric


def test_clipped_gradients_of_a_method_without_any_are_refused():
    with pytest.raises(UsageError, match=r"--robust-gradients: drone with --allocation uniform reads no gradients"):
        Settings.of(METHODS["drone"], Recipe(robust_gradients=True))


def test_without_a_backward_pass_the_default_falls_back_from_them_too():
    settings = Settings.of(METHODS["eckart"], Recipe(robust_gradients=True)).without_gradients()
    assert settings.method.metric is METHODS["drone"].metric


def test_they_change_what_a_model_becomes():
    torch.manual_seed(0)
    model = llama(num_hidden_layers=1)
    batches = [{"input_ids": torch.randint(0, 64, (2, 24))} for _ in range(3)]
    made = [
        eckart.compress(model, data=batches, method="kfac", keep=0.6, target="none", robust_gradients=robust)
        for robust in (False, True)
    ]
    plain, robust = (result.model.get_submodule("model.layers.0.mlp.up_proj").to_dense() for result in made)
    assert not torch.allclose(plain, robust, rtol=1e-3)
