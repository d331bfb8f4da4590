"""How much of a training's change is kept: the best place on the line from before it to after it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eckart.compression.best_part import FURTHEST, find_best_part, set_part
from eckart.compression.train_block import BlockFit, BlockTraining, train_block
from eckart.distributed import Processes

BEFORE, AFTER = [torch.tensor([1.0, -2.0]), torch.tensor([0.5])], [torch.tensor([3.0, 2.0]), torch.tensor([-0.5])]


def place_of(parameters: list[nn.Parameter]) -> float:
    """a of parameters at before + a (after - before)."""
    found = torch.cat([(p - old) / (new - old) for p, old, new in zip(parameters, BEFORE, AFTER, strict=True)])
    assert torch.allclose(found, found[:1].expand(3), atol=1e-6)
    return float(found.mean().detach())


def search(error: Callable[[float], float]) -> tuple[float, float, list[float]]:
    parameters, tried = [nn.Parameter(value.clone()) for value in BEFORE], []

    def measure() -> float:
        tried.append(place_of(parameters))
        return error(tried[-1])

    part, found = find_best_part(parameters, BEFORE, AFTER, (error(0.0), error(1.0)), measure)
    return part, found, tried


@pytest.mark.parametrize("lowest", [0.08, 0.3, 0.77, 1.0, 1.4])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_of_a_parabola_the_lowest_place_is_found(lowest: float, scale: float):
    part, found, tried = search(lambda a: scale * (2 + (a - lowest) ** 2))
    assert part == pytest.approx(lowest, rel=1e-5)
    assert found == pytest.approx(2 * scale, rel=1e-6)
    assert len(tried) <= 2


def test_what_was_measured_decides_and_not_the_parabola():
    steep = {0.0: 1.0, 0.5: 0.6, 1.0: 0.9}
    part, found, tried = search(lambda a: steep.get(round(a, 6), 5.0))  # where the parabola is lowest it is high
    assert (part, found, len(tried)) == (0.5, 0.6, 2)


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (lambda a: 1 + a, 0.0),  # worse all the way
        (lambda a: 1 + a * a, 0.0),
        (lambda a: 1.0, 0.0),  # no better anywhere
        (lambda a: 1 - a, 1.0),  # no lowest place
        (lambda a: 1 - a * a, 1.0),
        (lambda a: 10 - a + a * a / 100, FURTHEST),  # too far away to be tried
        (lambda a: 1.0 if not a else math.nan, 0.0),
        (lambda a: 1.0 if not a else math.inf, 0.0),
        (lambda a: math.nan if a == 1 else 1 - a, 0.5),
    ],
)
def test_the_search_stays_near_and_takes_nothing_worse(error: Callable[[float], float], part: float):
    found, at, tried = search(error)
    assert found == part
    assert at == error(part)
    assert all(0 < a <= FURTHEST + 1e-6 for a in tried)


def test_what_was_before_comes_back_exactly():
    parameters = [nn.Parameter(torch.zeros(2))]
    old, new = torch.tensor([0.1, 0.3]), torch.tensor([math.nan, math.inf])
    set_part(parameters, [old], [new], 0.0)
    assert torch.equal(parameters[0], old)
    set_part(parameters, [old], [torch.tensor([0.7, -0.2])], 1.0)
    assert torch.equal(parameters[0], torch.tensor([0.7, -0.2]))


def fit_noisy(rate: float, part: bool, epochs: int = 1) -> tuple[BlockFit, float, float]:
    """Fit a weight by noisy examples, one at a time, and give its held-out error as it was told and as it is."""
    generator = torch.Generator().manual_seed(3)
    true = torch.randn(16, generator=generator)
    weight = nn.Parameter(true + 0.3 * torch.randn(16, generator=generator))
    inputs = torch.randn(96, 16, generator=generator)
    wanted = inputs @ true + 2.0 * torch.randn(96, generator=generator)
    wanted[:32] = inputs[:32] @ true

    def error(batch: slice) -> tuple[Tensor, Tensor]:
        return (inputs[batch] @ weight - wanted[batch]).square().sum(), wanted[batch].square().sum()

    training = BlockTraining(epochs=epochs, rate=rate, largest=math.inf, part=part)
    steps = [[slice(i, i + 1)] for i in range(32, 96)]
    fit = train_block([weight], steps, [slice(0, 32)], error, training, Processes(), 1.0)
    wrong, power = error(slice(0, 32))
    return fit, fit.after, float((wrong / power).detach())


def test_a_rate_that_is_too_large_goes_only_part_of_the_way():
    without, *_ = fit_noisy(0.4, part=False)
    fit, told, found = fit_noisy(0.4, part=True)
    assert without.epoch == 0, "its end is no better"
    assert fit.epoch == 1
    assert 0 < fit.part < 1
    assert told == pytest.approx(found, rel=1e-5)
    assert fit.after < 0.95 * fit.before


def test_the_best_epoch_is_where_the_line_ends():
    without, *_ = fit_noisy(0.05, part=False, epochs=4)
    fit, told, found = fit_noisy(0.05, part=True, epochs=4)
    assert 0 < fit.epoch == without.epoch < 4
    assert told == pytest.approx(found, rel=1e-5)
    assert fit.after < without.after


@pytest.mark.parametrize("start", [math.nan, math.inf])
def test_where_no_error_is_a_number_nothing_is_kept(start: float):
    parameters = [nn.Parameter(BEFORE[0].clone())]
    part, _ = find_best_part(parameters, BEFORE[:1], AFTER[:1], (start, math.nan), lambda: math.nan)
    assert part == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_block_whose_error_is_no_number_is_not_trained(value: float):
    weight, steps = nn.Parameter(torch.ones(3)), []

    def error(batch: float) -> tuple[Tensor, Tensor]:
        steps.append(batch)
        return batch * weight.sum(), torch.tensor(1.0)

    fit = train_block([weight], [[1.0]] * 4, [value], error, BlockTraining(part=True), Processes(), 1.0)
    assert (fit.epoch, fit.part) == (0, 0.0)
    assert steps == [value]
    assert torch.equal(weight, torch.ones(3))


def test_a_training_whose_error_is_no_number_any_more_ends_early():
    weight, trained = nn.Parameter(torch.ones(3)), []

    def error(batch: float) -> tuple[Tensor, Tensor]:
        trained.extend([batch] * torch.is_grad_enabled())
        return (batch * weight - 2.0).square().sum(), torch.tensor(1.0)

    training = BlockTraining(epochs=5, rate=1e30, largest=math.inf)
    fit = train_block([weight], [[1.0]] * 4, [1.5], error, training, Processes(), 1.0)
    assert fit.epoch == 0
    assert len(trained) == 4
    assert torch.equal(weight, torch.ones(3))


def test_where_no_place_is_better_nothing_changes():
    fit, told, found = fit_noisy(1e30, part=True)
    assert (fit.epoch, fit.part) == (0, 0.0)
    assert told == pytest.approx(found, rel=1e-5)
    assert fit.after == fit.before
