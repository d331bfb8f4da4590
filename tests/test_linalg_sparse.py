"""The low-rank + sparse split, what prunes S, and the form that stores it."""

import pytest
import torch
from problems import close, normal, unchanged, with_spectrum

from eckart.errors import NumericalError, UsageError
from eckart.linalg import averaged_importance, cubic_fraction, low_rank_sparse_split, rows_above, smallest_masked

# -- the split ----------------------------------------------------------------------------------------


def spiked(rows: int, columns: int, rank: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of that rank with large entries at some positions, and the positions."""
    places = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(3))[:count].sort().values
    spikes = torch.zeros(rows * columns, dtype=torch.float64).scatter(0, places, 8 * normal(count, seed=4).sign())
    values = torch.linspace(4, 1, rank, dtype=torch.float64)
    return with_spectrum(rows, columns, values) + spikes.view(rows, columns), places


@pytest.mark.parametrize(("rows", "columns"), [(30, 20), (20, 30)])
def test_split_finds_what_was_mixed(rows, columns):
    weight, places = spiked(rows, columns, 3, 12)
    with unchanged(weight):
        split = low_rank_sparse_split(weight, 3, 12)
    assert torch.equal(split.positions, places)
    assert split.history[-1] < 1e-6 * float(weight.norm())
    again = low_rank_sparse_split(weight, 3, 12)
    assert all(torch.equal(getattr(split, key), getattr(again, key)) for key in ("left", "right", "positions"))


@pytest.mark.parametrize(("rank", "count", "rounds"), [(4, 20, 100), (12, 5, 100), (5, 0, 7), (0, 9, 3), (8, 240, 2)])
def test_split_residual_never_rises(rank, count, rounds):
    weight = normal(20, 12)
    split = low_rank_sparse_split(weight, rank, count, rounds)
    history = torch.tensor(split.history, dtype=torch.float64)
    assert len(history) == rounds
    assert bool((history.diff() <= 1e-9 * history[0] + 1e-12).all())
    assert (split.left.shape, split.right.shape) == ((20, rank), (rank, 12))
    assert len(split.positions.unique()) == len(split.values) == count
    sparse = torch.zeros(240, dtype=torch.float64).scatter(0, split.positions, split.values).view(20, 12)
    residual = (weight - split.left @ split.right - sparse).norm()
    assert float(residual) == pytest.approx(float(history[-1]), rel=1e-9, abs=1e-9)
    if rank and count:
        best = torch.linalg.svdvals(weight)[rank:].norm()
        assert history[-1] <= best + 1e-9  # no worse than a truncation alone


def test_a_direction_is_a_row_after_one_power_step():
    weight = normal(9, 7)
    largest = int(weight.square().sum(1).argmax())
    expected = (weight @ weight.mT @ weight @ weight.mT)[:, largest]  # U spans W V^T, V^T = W^T W w
    split = low_rank_sparse_split(weight, 1, 0, 1)
    close((split.left[:, 0] @ expected).abs(), expected.norm(), 1e-12)


def test_split_without_sparse_part_is_the_truncation():
    weight = with_spectrum(20, 12, 0.5 ** torch.arange(12, dtype=torch.float64))
    split = low_rank_sparse_split(weight, 4, 0)
    close(torch.tensor(split.history[-1]), torch.linalg.svdvals(weight)[4:].norm().float(), 1e-6)


def test_split_of_zero_and_refusals():
    split = low_rank_sparse_split(torch.zeros(6, 4), 2, 3)
    assert split.history[-1] == 0
    for rank, count, rounds in ((5, 3, 1), (-1, 3, 1), (2, 25, 1), (2, 3, 0)):
        with pytest.raises(UsageError, match=r"h\.0: a split of 6 x 4"):
            low_rank_sparse_split(torch.zeros(6, 4), rank, count, rounds, "h.0")
    weight = torch.zeros(6, 4)
    weight[1, 1] = torch.nan
    with pytest.raises(NumericalError, match=r"h\.0: 1 of 24"):
        low_rank_sparse_split(weight, 2, 3, 1, "h.0")


# -- pruning ------------------------------------------------------------------------------------------


def test_schedule_at_its_ends_and_in_the_middle():
    def fraction(step):
        return cubic_fraction(step, 100, 0.1, 0.3, 0.2)

    assert [fraction(step) for step in (0, 5, 10)] == [1, 1, 1]
    assert fraction(40) == pytest.approx(0.2 + 0.8 * 0.5**3)  # half of the way from 10 to 70
    assert fraction(55) == pytest.approx(0.2 + 0.8 * 0.25**3)
    assert [fraction(step) for step in (70, 85, 100, 200)] == [0.2] * 4
    steps = [fraction(step) for step in range(101)]
    assert steps == sorted(steps, reverse=True)
    assert cubic_fraction(0, 10, 0, 1, 0.5) == 0.5
    assert [cubic_fraction(step, 1, 0.9, 0.1, 0.5) for step in (0, 1)] == [1, 0.5]  # one step down
    for warmup, final, target in ((0.6, 0.5, 0.2), (-0.1, 0, 0.2), (0, -0.1, 0.2), (0, 0, 1.2), (0, 0, -0.1)):
        with pytest.raises(UsageError, match="pruning schedule"):
            cubic_fraction(0, 100, warmup, final, target)


def test_importance_is_an_exponential_average():
    first = averaged_importance(None, torch.tensor([1.0, 2.0]), 0.85)
    close(first, torch.tensor([0.15, 0.3]), 1e-6)
    close(averaged_importance(first, torch.tensor([2.0, 0.0]), 0.85), torch.tensor([0.4275, 0.255]), 1e-6)


def test_one_threshold_over_matrices_of_different_width():
    scores = [torch.tensor([5.0, 1.0, 3.0]), torch.tensor([4.0, 2.0])]
    everything = [torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.bool)]

    def kept(budget, alive=everything):
        return [mask.tolist() for mask in rows_above(scores, alive, [3, 10], budget)]

    assert kept(0) == [[False] * 3, [False] * 2]
    assert kept(3) == [[True, False, False], [False, False]]
    assert kept(12) == kept(3)  # the next row by score costs 10: no worse one goes before it
    assert kept(13) == [[True, False, False], [True, False]]
    assert kept(16) == [[True, False, True], [True, False]]
    assert kept(29) == [[True] * 3, [True] * 2]
    gone = [torch.tensor([False, True, True]), torch.tensor([True, True])]
    assert kept(29, gone) == [[False, True, True], [True, True]]
    assert kept(13, gone) == [[False, False, True], [True, False]]


def test_smallest_numbers_over_all_matrices():
    weights = [torch.tensor([[1.0, -4.0], [3.0, 0.5]]), torch.tensor([[-2.0, 6.0]])]
    masks, threshold = smallest_masked(weights, 0.5)
    assert [mask.tolist() for mask in masks] == [[[False, True], [True, False]], [[False, True]]]
    assert threshold == 2
    masks, threshold = smallest_masked(weights, 0)
    assert all(bool(mask.all()) for mask in masks)
