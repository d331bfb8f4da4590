"""The random change that does as much harm as a compression: found from near and from far, and undone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eckart.compression.equal_noise import find_equal_noise
from eckart.distributed import Processes

LEAST = 1e-3
Error = Callable[[float], tuple[Tensor, Tensor]]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(size * torch.randn(60, 50, generator=generator)) for size in (0.1, 3.0)]


def quadratic(trained: list[nn.Parameter], distance: float, sensitivity: float) -> Error:
    """A distance from the start that grows by `sensitivity e^2` when noise of relative size e is added."""
    starts = [p.detach().clone() for p in trained]

    def error(batch: float) -> tuple[Tensor, Tensor]:
        moved = [(p - start).square().mean() / start.square().mean() for p, start in zip(trained, starts, strict=True)]
        return batch * (distance + sensitivity * torch.stack(moved).mean()), torch.tensor(batch)

    return error


@pytest.mark.parametrize(
    ("distance", "sensitivity"), [(0.0138, 12.0), (0.4, 200.0), (1e-4, 1.0), (0.5, 20.0), (1e-4, 500.0)]
)
def test_noise_of_that_size_doubles_the_distance(distance: float, sensitivity: float):
    trained = parameters()
    starts = [p.detach().clone() for p in trained]
    found = find_equal_noise(trained, [1.0, 3.0], quadratic(trained, distance, sensitivity), LEAST, Processes())
    assert found == pytest.approx(math.sqrt(distance / sensitivity), rel=0.05)
    assert all(torch.equal(p, start) for p, start in zip(trained, starts, strict=True))


def test_a_model_that_noise_breaks_is_tried_with_less():
    trained = parameters()
    own, tried = quadratic(trained, 0.01, 1e3), []

    def error(batch: float) -> tuple[Tensor, Tensor]:
        value, count = own(batch)
        tried.append(float(value))
        return (value if float(value) < 0.2 else torch.tensor(math.nan)), count

    assert find_equal_noise(trained, [1.0], error, LEAST, Processes()) == pytest.approx(10**-2.5, rel=0.05)
    assert max(tried) > 0.2


def test_no_distance_is_no_noise_and_zeros_move():
    trained = [nn.Parameter(torch.zeros(100))]
    assert find_equal_noise(trained, [1.0], lambda batch: (torch.zeros(()), torch.ones(())), LEAST, Processes()) == 0.0
    moved = []

    def error(batch: float) -> tuple[Tensor, Tensor]:
        moved.append(float(trained[0].detach().square().mean().sqrt()))
        return torch.tensor(1.0) + (trained[0] / LEAST).square().mean(), torch.ones(())

    assert find_equal_noise(trained, [1.0], error, LEAST, Processes()) == pytest.approx(1.0, rel=0.3)
    assert max(moved) > 0.1 * LEAST


def test_what_fails_on_the_way_leaves_the_parameters_as_they_were():
    trained = parameters()
    starts = [p.detach().clone() for p in trained]
    calls = []

    def error(batch: float) -> tuple[Tensor, Tensor]:
        calls.append(batch)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.ones(()), torch.ones(())

    with pytest.raises(torch.OutOfMemoryError):
        find_equal_noise(trained, [1.0], error, LEAST, Processes())
    assert all(torch.equal(p, start) for p, start in zip(trained, starts, strict=True))
