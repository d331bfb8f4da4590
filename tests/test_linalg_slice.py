"""Taking neurons away: the order is greedy, the corrections are the best ones, the curve is the true error."""

from dataclasses import replace

import pytest
import torch
from problems import close, layer, normal, unchanged
from torch import Tensor

from eckart.errors import NumericalError
from eckart.linalg import Metric, Problem, Slicing, slice_neurons, slicing_curve_under, weighted_error
from eckart.linalg import slice as slicing


def problem(rows: int = 9, neurons: int = 14, dead: int = 0, seed: int = 0) -> Problem:
    """A weight under metrics of correlated, non-negative activations and correlated gradients."""
    active = (normal(400, neurons, seed=seed) @ normal(neurons, neurons, seed=seed + 1) / neurons**0.5).clamp_min(0)
    active[:, :dead] = 0
    given = normal(200, rows, seed=seed + 2) @ normal(rows, rows, seed=seed + 3) / rows**0.5
    return Problem(
        normal(rows, neurons, seed=seed + 4),
        Metric(full=given.mT @ given, scale=1 / 200),
        Metric(full=active.mT @ active, scale=1 / 400),
    )


def brute_force(given: Problem) -> tuple[list[int], Tensor]:
    """The rule as it is written: one neuron a step, every matrix updated as a whole; cost of each, last one first."""
    weight, inverse = given.target.clone(), torch.linalg.inv(given.right.matrix)
    left = given.left.matrix
    alive = list(range(weight.shape[1]))
    removed: list[int] = []
    costs: list[Tensor] = []
    while alive:
        price = torch.stack([weight[:, i] @ left @ weight[:, i] / inverse[i, i] for i in alive])
        i = alive.pop(int(price.argmin()))
        removed.append(i)
        costs.append(price.min())
        ratio = inverse[i] / inverse[i, i]
        weight = weight - torch.outer(weight[:, i], ratio)
        inverse = inverse - inverse[i, i] * torch.outer(ratio, ratio)
    return removed[::-1], torch.stack(costs[::-1])


def best_reader(given: Problem, kept: Tensor) -> Tensor:
    """`W C S (S^T C S)^-1` in the columns that are kept, zeros in the others."""
    metric = given.right.matrix
    full = torch.zeros_like(given.target)
    full[:, kept] = torch.linalg.solve(metric[kept][:, kept], given.target @ metric[:, kept], left=False)
    return full


def in_place(solved: Slicing, count: int, like: Tensor) -> Tensor:
    kept, weight = solved.corrected(count)
    full = torch.zeros_like(like)
    full[:, kept] = weight.to(like)
    return full


def error_of(given: Problem, weight: Tensor) -> float:
    return float(weighted_error(given.target - weight, given.left, given.right))


@pytest.mark.parametrize("steps", [1, 3, 128])
@pytest.mark.parametrize(("rows", "neurons"), [(9, 14), (30, 40), (3, 90), (1, 5), (4, 1)])
def test_order_and_costs_are_those_of_the_rule(rows, neurons, steps, monkeypatch):
    monkeypatch.setattr(slicing, "STEPS", steps)
    given = problem(rows, neurons)
    with unchanged(given.target, given.left.full, given.right.full):
        solved = slice_neurons(given)
    order, costs = brute_force(given)
    assert solved.order.tolist() == order
    close(solved.squared, costs, 1e-7)
    assert solved.notes == ()


def test_corrections_are_the_best_ones_and_the_curve_is_their_error():
    given = problem()
    solved = slice_neurons(given)
    assert solved.curve.shape == (15,)
    close(solved.curve[0], weighted_error(given.target, given.left, given.right), 1e-7)
    for count in range(1, 15):
        kept, weight = solved.corrected(count)
        assert kept.tolist() == sorted(solved.order[:count].tolist())
        assert weight.shape == (9, count)
        answer = in_place(solved, count, given.target)
        close(answer, best_reader(given, kept), 1e-6)
        assert error_of(given, answer) == pytest.approx(float(solved.curve[count]), rel=1e-6, abs=1e-9)
    assert torch.equal(kept, torch.arange(14))
    close(weight, given.target, 1e-9)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(2))
def test_curve_falls_to_zero(shrinkage, seed):
    for found in (layer(12, 20, seed=seed), layer(20, 12, seed=seed), layer(8, 16, sequences=1, tokens=3, seed=seed)):
        given = found.problem_of("kfac")
        solved = slice_neurons(replace(given, right=found.moments.input_metric.shrunk(shrinkage)))
        assert bool((solved.curve.diff() <= 0).all())
        assert float(solved.curve[-1]) == 0
        assert bool(solved.curve.isfinite().all())


def test_better_than_chance_and_than_magnitudes():
    worse = {"chance": 0, "magnitude": 0}
    for seed in range(6):
        given = problem(12, 24, seed=10 * seed)
        solved = slice_neurons(given)
        for count in (6, 12, 18):
            others = {
                "chance": torch.randperm(24, generator=torch.Generator().manual_seed(seed)),
                "magnitude": (given.target.norm(dim=0) * given.right.matrix.diagonal().sqrt()).argsort(descending=True),
            }
            for name, order in others.items():
                worse[name] += error_of(given, best_reader(given, order[:count])) > float(solved.curve[count])
    assert worse == {"chance": 18, "magnitude": 18}


def test_neurons_and_outputs_may_stand_in_any_order():
    given = problem(11, 17)
    rows, columns = torch.randperm(11, generator=torch.Generator().manual_seed(1)), normal(17, seed=3).argsort()
    moved = Problem(
        given.target[rows][:, columns],
        Metric(full=given.left.matrix[rows][:, rows]),
        Metric(full=given.right.matrix[columns][:, columns]),
    )
    one, other = slice_neurons(given), slice_neurons(moved)
    assert columns[other.order].tolist() == one.order.tolist()
    close(other.curve, one.curve, 1e-9)
    close(in_place(other, 7, moved.target), in_place(one, 7, given.target)[rows][:, columns], 1e-7)


def test_unit_of_a_neuron_does_not_matter():
    given = problem(8, 12)
    scale = torch.linspace(0.3, 3, 12, dtype=torch.float64)
    other = Problem(given.target / scale, given.left, Metric(full=scale[:, None] * given.right.matrix * scale))
    assert slice_neurons(other).order.tolist() == slice_neurons(given).order.tolist()
    close(slice_neurons(other).curve, slice_neurons(given).curve, 1e-6)


def test_dead_neurons_go_first_and_cost_nothing():
    given = problem(6, 12, dead=4)
    solved = slice_neurons(given)
    assert sorted(solved.order[8:].tolist()) == [0, 1, 2, 3]
    assert float(solved.curve[8]) <= 1e-8 * float(solved.curve[0])
    assert float(solved.curve[7]) > 1e-4 * float(solved.curve[0])
    kept, weight = solved.corrected(8)
    assert kept.tolist() == list(range(4, 12))
    close(weight, given.target[:, 4:], 1e-7)


def test_a_neuron_that_others_add_up_to_costs_nothing():
    given = problem(6, 10)
    mix = torch.eye(10, dtype=torch.float64)
    mix[9] = 0
    mix[9, :2] = 1  # neuron 9 fires as 0 and 1 together
    right = Metric(full=mix @ given.right.matrix @ mix.mT)
    solved = slice_neurons(replace(given, right=right))
    assert int(solved.order[-1]) in (0, 1, 9)
    assert float(solved.curve[9]) <= 1e-7 * float(solved.curve[0])
    answer = in_place(solved, 9, given.target)
    close(answer @ mix, given.target @ mix, 1e-5)


def test_without_metrics_the_shortest_columns_go_first():
    weight = normal(5, 8)
    solved = slice_neurons(Problem(weight))
    assert solved.order.tolist() == weight.norm(dim=0).argsort(descending=True).tolist()
    close(solved.corrected(3)[1], weight[:, solved.order[:3].sort().values], 1e-9)
    diagonal = torch.linspace(1, 20, 8, dtype=torch.float64)
    solved = slice_neurons(Problem(weight, right=Metric(diagonal=diagonal)))
    assert solved.order.tolist() == (weight.norm(dim=0) * diagonal.sqrt()).argsort(descending=True).tolist()


def test_activations_that_never_were():
    weight = normal(5, 8)
    solved = slice_neurons(Problem(weight, right=Metric(full=torch.zeros(8, 8, dtype=torch.float64))))
    assert not solved.curve.any()
    close(solved.corrected(3)[1], weight[:, solved.order[:3].sort().values], 1e-9)


def test_curve_in_another_metric():
    given = problem(10, 16)
    solved = slice_neurons(Problem(given.target, right=given.right))
    curve = slicing_curve_under(solved, given, points=17)
    for count in range(1, 16):
        expected = error_of(given, in_place(solved, count, given.target))
        assert float(curve[count]) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert float(curve[0]) == pytest.approx(error_of(given, torch.zeros_like(given.target)))
    few = slicing_curve_under(solved, given, points=5)
    close(few[::4], curve[::4], 1e-12)
    close(few[2], (curve[0] + curve[4]) / 2, 1e-12)
    assert float(few[-1]) == 0


def test_sizes_up_to_a_limit_alone():
    given = problem()
    solved = slice_neurons(given)
    few = solved.kept(6)
    assert few.limit == 6
    assert torch.equal(few.curve, solved.curve)
    for one, other in zip(few.corrected(5), solved.corrected(5), strict=True):
        close(one.double(), other.double(), 1e-12)
    assert few.lower.untyped_storage().nbytes() == 6 * 6 * 8
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=f"{wrong} neurons: corrections are known of 1 to 6"):
            few.corrected(wrong)


def test_wide_layers_in_single_precision(monkeypatch):
    monkeypatch.setattr(slicing, "WIDE", 64)
    given = problem(20, 150)
    single = Problem(
        given.target.float(),
        Metric(full=given.left.full.float(), scale=given.left.scale).shrunk(0.3),
        Metric(full=given.right.full.float(), scale=given.right.scale).shrunk(0.1),
    )
    solved = slice_neurons(single)
    assert solved.lower.dtype == torch.float32
    exact = slice_neurons(Problem(given.target, given.left.shrunk(0.3), given.right.shrunk(0.1)))
    close(solved.curve, exact.curve, 1e-3)
    answer = in_place(solved, 75, given.target)
    assert error_of(Problem(given.target, given.left.shrunk(0.3), given.right.shrunk(0.1)), answer) == pytest.approx(
        float(solved.curve[75]), rel=1e-3
    )


def test_what_is_not_finite_or_no_metric_is_refused():
    given = problem()
    broken = given.target.clone()
    broken[2, 3] = torch.nan
    with pytest.raises(NumericalError, match="down: 1 of 126 entries are NaN"):
        slice_neurons(replace(given, target=broken), "down")
    full = given.right.matrix
    full[0, 0] = torch.inf
    with pytest.raises(NumericalError, match="down: metric of its neurons: 1 of 196"):
        slice_neurons(replace(given, right=Metric(full=full)), "down")
    negative = -torch.eye(14, dtype=torch.float64)
    negative[0, 0] = 1
    with pytest.raises(NumericalError, match="down: the metric of its neurons is not positive semi-definite"):
        slice_neurons(replace(given, right=Metric(full=negative)), "down")


def test_a_metric_with_rounding_below_zero_is_raised_and_noted():
    given = problem(6, 10)
    values, vectors = torch.linalg.eigh(given.right.matrix)
    values[0] = -1e-5 * values.mean()
    solved = slice_neurons(replace(given, right=Metric(full=vectors * values @ vectors.mT)), "down")
    assert solved.notes == ("down: a singular metric of its neurons was raised by 0.0001",)
    assert bool(solved.curve.isfinite().all())
