"""Which tokens a model goes on with: scores, masks, schedules."""

from __future__ import annotations

import math

import pytest
import torch

from eckart.linalg import (
    bent,
    count_kept,
    keep_above,
    keep_most,
    pick,
    raised,
    reach,
    relative,
    retained_fractions,
    significance,
    soft_extract,
    soft_keep,
)

REAL = torch.tensor([[True, True, True, True], [True, True, False, False]])
SCORES = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.6, 0.4, 9.0, 8.0]])


def test_significance_sums_what_real_queries_of_all_heads_look_at():
    torch.manual_seed(0)
    attention = torch.rand(2, 3, 4, 4).masked_fill(~REAL[:, None, None, :], 0)
    attention = attention / attention.sum(-1, keepdim=True)
    found = significance(attention, REAL)
    for row in range(2):
        for token in range(4):
            queries = [q for q in range(4) if REAL[row, q]]
            expected = sum(float(attention[row, head, q, token]) for head in range(3) for q in queries)
            assert float(found[row, token]) == pytest.approx(expected * bool(REAL[row, token]), abs=1e-6)
    assert found.sum(1).tolist() == pytest.approx([12.0, 6.0])  # heads times real queries: each looks once in all
    assert significance(attention.bfloat16(), REAL).dtype == torch.float32


def test_relative_scores_have_mean_one_over_real_tokens():
    found = relative(SCORES, REAL)
    assert found[0].mean() == pytest.approx(1)
    assert found[1, :2].tolist() == pytest.approx([1.2, 0.8])
    assert relative(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("length", "fraction", "kept"), [
    (10, 0.5, 5), (10, 0.25, 3), (10, 0.24, 2), (10, 0.0, 1), (7, 1.0, 7), (0, 0.5, 0), (3, 0.5, 2),
])  # fmt: skip
def test_counts_are_rounded_and_leave_one(length, fraction, kept):
    assert count_kept(torch.tensor([length]), fraction).tolist() == [kept]


def test_the_best_tokens_stay_and_padding_goes_first():
    assert keep_most(SCORES, REAL, torch.tensor([2, 2])).tolist() == [
        [False, True, False, True],
        [True, True, False, False],
    ]
    assert keep_most(SCORES, REAL, torch.tensor([3, 4]))[1].tolist() == [True, True, False, False]
    first = torch.zeros_like(REAL)
    first[:, 0] = True
    kept = keep_most(SCORES, REAL, torch.tensor([2, 1]), first)
    assert kept.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert keep_most(SCORES, REAL, torch.tensor([1, 1]), REAL).tolist() == REAL.tolist()  # all of these stay
    equal = keep_most(torch.ones(1, 4), REAL[:1], torch.tensor([2]))
    assert equal.tolist() == [[True, True, False, False]]


def test_what_is_above_a_threshold_stays_and_one_token_at_least():
    assert keep_above(SCORES, REAL, 0.3).tolist() == [[False, True, False, True], [True, True, False, False]]
    assert keep_above(SCORES, REAL, 0.5).tolist() == [[False, True, False, False], [True, False, False, False]]
    first = torch.zeros_like(REAL)
    first[:, 0] = True
    assert keep_above(SCORES, REAL, 99.0, first).tolist() == first.tolist()


def test_soft_masks_are_half_at_the_threshold_and_sharp_when_it_is_cold():
    threshold = torch.tensor(0.3)
    found = soft_keep(SCORES[0], threshold, 0.1)
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(-(s - 0.3) / 0.1)) for s in SCORES[0].tolist()])
    hard = keep_above(SCORES[:1], REAL[:1], 0.29)
    assert torch.equal(soft_keep(SCORES[:1], threshold - 0.01, 1e-4).round().bool(), hard)


def test_soft_extraction_multiplies_by_place_in_the_order_of_scores():
    retention = torch.tensor([1.0, 0.8, 0.4, 0.1], requires_grad=True)
    found = soft_extract(SCORES, REAL, retention)
    # Four tokens have a parameter each; of two the better has that at a quarter of them, the other at three quarters.
    assert found[0].tolist() == pytest.approx([0.1, 1.0, 0.4, 0.8])
    assert found[1].tolist() == pytest.approx([0.8, 0.1, 1.0, 1.0])
    found[0].sum().backward()
    assert retention.grad.tolist() == [1, 1, 1, 1]


def test_a_schedule_is_the_mass_of_its_parameters_and_never_rises():
    assert retained_fractions(torch.tensor([[1.0, 0.5], [1.0, 1.0], [0.2, 0.0]])) == pytest.approx([0.75, 0.75, 0.1])


def test_picked_places_are_in_order_and_each_at_most_once():
    kept = torch.tensor([[False, True, False, True], [True, False, False, False]])
    places, there = pick(kept)
    assert places[0].tolist() == [1, 3]
    assert there.tolist() == [[True, True], [True, False]]
    assert places[1, 0] == 0
    assert places[1, 1] != 0
    assert pick(torch.zeros(0, 3, dtype=torch.bool))[0].shape == (0, 0)


def test_a_family_is_followed_to_the_wished_cost():
    shape = [0.9, 0.5]
    assert bent(shape)(1) == shape
    assert bent(shape)(0) == [1, 1]
    levels = reach(bent(shape), sum, 0.7)
    assert sum(levels) == pytest.approx(0.7, abs=1e-6)
    assert sum(levels) <= 0.7
    assert math.log(levels[0]) / math.log(0.9) == pytest.approx(math.log(levels[1]) / math.log(0.5))
    assert sum(reach(bent(shape), sum, 2.5)) == pytest.approx(2)  # nothing need leave
    assert sum(reach(bent(shape), sum, -1.0)) < 1e-6  # nothing reaches it
    assert raised([0.2, 0.5])(0.5) == pytest.approx([0.2, 0.5])
    assert raised([0.2, 0.5])(0) == [0, 0]
    assert raised([0.2, 0.5])(1.5) == pytest.approx([1.2, 1.5])
