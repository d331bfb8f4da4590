"""What every registered method must hold, on every registered form; a new one is tested without new code."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    LAYERS,
    REGULAR,
    answer_of,
    close,
    error_of,
    every_form,
    every_layer,
    every_method,
    every_regular_layer,
    few_examples,
    layer,
    layers,
    normal,
    stored,
    unchanged,
)

from eckart.allocation import stored_elements, uniform
from eckart.errors import NumericalError
from eckart.forms import FORMS
from eckart.linalg import Metric, Problem, curve_under, factorize
from eckart.methods import METHODS, method_named
from eckart.moments import Moments
from eckart.registry import STATISTICS

CANDIDATES = 100

# The pivoted form of full row rank has no rows left to combine.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


def ranks_of(problem: Problem) -> range:
    return range(min(problem.target.shape) + 1)


def some_ranks(problem: Problem) -> set[int]:
    full = min(problem.target.shape)
    return {rank for rank in (1, full // 3, full // 2, full - 1) if rank >= 1}


def scale_of(problem: Problem) -> float:
    """`|| L T R ||^2`, the error of giving nothing."""
    return error_of(problem, torch.zeros_like(problem.target))


def tensors_of(found) -> list[torch.Tensor]:
    moments = found.moments
    return [found.weight, *(tensor for tensor in moments.state().values() if tensor.dim())]


# -- the solution ------------------------------------------------------------------------------------


@every_layer
@every_method
def test_full_size_reproduces_the_target(method, centered, found):
    problem = found.problem_of(method, centered)
    solved = factorize(problem)
    close(solved.left @ solved.right, problem.target, 1e-9)


@every_layer
@every_method
def test_weighted_error_is_the_singular_tail_and_never_rises(method, centered, found):
    problem = found.problem_of(method, centered)
    curve, scale = factorize(problem).curve, scale_of(problem)
    measured = [error_of(problem, answer_of(problem, rank)) for rank in ranks_of(problem)]
    assert float(curve[-1]) == 0
    assert bool((curve[1:] <= curve[:-1]).all())
    assert curve.tolist() == pytest.approx(measured, rel=0, abs=1e-10 * scale)
    rises = [after - before for before, after in itertools.pairwise(measured)]
    assert max(rises, default=0) <= 1e-12 * scale


@pytest.mark.parametrize("name", METHODS)
def test_any_shape_spectrum_and_number_of_tokens(name):
    @few_examples
    @given(found=layers(), share=st.floats(0, 1))
    def check(found, share):
        problem = found.problem_of(name)
        rank = round(share * min(problem.target.shape))
        solved = factorize(problem)
        scale = scale_of(problem)
        close(solved.left @ solved.right, problem.target, 1e-8)
        error = error_of(problem, answer_of(problem, rank))
        assert error == pytest.approx(float(solved.curve[rank]), abs=1e-10 * scale)
        assert error <= best_candidate(problem, rank) + 1e-9 * scale

    check()


@every_layer
@every_method
def test_no_candidate_is_better(method, centered, found):
    problem = found.problem_of(method, centered)
    for rank in some_ranks(problem):
        error = error_of(problem, answer_of(problem, rank))
        assert error <= best_candidate(problem, rank) + 1e-9 * scale_of(problem)


def best_candidate(problem: Problem, rank: int) -> float:
    """The least error of plain SVD and of 100 others, half of them small steps away from the answer."""
    plain = error_of(problem, answer_of(Problem(problem.target), rank))
    if rank == 0:
        return plain
    left, right = factorize(problem).truncated(rank)
    half = CANDIDATES // 2
    steps = 10.0 ** -torch.arange(half, dtype=torch.float64).remainder(6)[:, None, None]
    size = float(left.abs().max())
    lefts = torch.cat([normal(half, *left.shape, seed=1), left + size * steps * normal(half, *left.shape, seed=2)])
    rights = torch.cat([normal(half, *right.shape, seed=3), right.expand(half, -1, -1)])
    # For half of each kind the other factor is the best one there is, so that they are hard to beat.
    fitted = [b @ fit(problem, b) for b in lefts[::2]]
    fitted += [(a.mT @ fit(problem.mirrored, a.mT)).mT for a in rights[1:half:2]]
    fitted += [b @ right for b in lefts[half + 1 :: 2]]
    assert len(fitted) == CANDIDATES
    return min([plain, *(error_of(problem, candidate) for candidate in fitted)])


def fit(problem: Problem, left: torch.Tensor) -> torch.Tensor:
    """The best A for a given B: `(B^T H B)^+ B^T H T`."""
    weighted = problem.left.times(left)
    return torch.linalg.pinv(left.mT @ weighted, hermitian=True) @ (weighted.mT @ problem.target)


@every_layer
@every_method
def test_inputs_stay_and_bits_repeat(method, centered, found):
    with unchanged(found.weight, found.inputs, found.gradients):
        problem = found.problem_of(method, centered)
        metrics = [m for side in (problem.left, problem.right) for m in (side.full, side.diagonal) if m is not None]
        with unchanged(*metrics):
            first, second = factorize(problem), factorize(found.problem_of(method, centered))
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert torch.equal(first.squared, second.squared)


@every_method
def test_making_the_problem_leaves_the_statistics(method, centered):
    found = LAYERS["tall"]
    moments = found.moments
    moments.centered = centered
    with unchanged(*tensors_of(found), moments["gram"].gram, moments["gradients"].gram):
        factorize(method.metric(found.weight, moments))


# -- symmetries --------------------------------------------------------------------------------------


@every_regular_layer
@every_method
def test_permuted_inputs_and_outputs_permute_the_answer(method, centered, found):
    rows, columns = found.weight.shape
    outputs, inputs = normal(rows, seed=7).argsort(), normal(columns, seed=8).argsort()
    problem = found.problem_of(method, centered)
    permuted = found.take(outputs, inputs).problem_of(method, centered)
    for rank in some_ranks(problem):
        close(answer_of(permuted, rank), answer_of(problem, rank)[outputs][:, inputs], 1e-8)


def unshrunk_kfac(found) -> Problem:
    moments = found.moments
    return Problem(found.weight, Metric(full=moments["gradients"].mean), Metric(full=moments["gram"].mean))


RESCALABLE = {
    "drone": (lambda found: found.problem_of("drone"), False),
    "svd-llm": (lambda found: found.problem_of("svd-llm"), False),
    "kfac without shrinkage": (unshrunk_kfac, True),
}


@every_regular_layer
@pytest.mark.parametrize(("problem_of", "both"), RESCALABLE.values(), ids=RESCALABLE)
def test_rescaled_inputs_move_the_answer_with_them(problem_of, both, found):
    rows, columns = found.weight.shape
    inputs = torch.logspace(-1, 1, columns, dtype=torch.float64)
    outputs = torch.logspace(1, -1, rows, dtype=torch.float64) if both else torch.ones(rows, dtype=torch.float64)
    problem, moved = problem_of(found), problem_of(found.rescaled(outputs, inputs))
    for rank in some_ranks(problem):
        close(answer_of(moved, rank), outputs[:, None] * answer_of(problem, rank) / inputs, 1e-7)


# -- what the papers say -----------------------------------------------------------------------------


@every_regular_layer
@pytest.mark.parametrize("name", ["fwsvd", "fwsvd-columns"])
def test_fisher_weighting_with_a_constant_fisher_is_svd(name, found):
    moments = found.moments
    moments["fisher"].rows.fill_(3.7)
    moments["fisher"].columns.fill_(3.7)
    problem = method_named(name).metric(found.weight, moments)
    for rank in some_ranks(problem):
        close(answer_of(problem, rank), answer_of(found.problem_of("svd"), rank), 1e-10)


@pytest.mark.parametrize(("name", "side"), [("fwsvd", "left"), ("fwsvd-columns", "right")])
def test_fisher_weighs_the_stated_axis(name, side):
    """Row i of W (out, in) is weighed by the squared gradients of row i, column j by those of column j."""
    found = LAYERS["tall"]
    squared = sum((g.mT @ x).square() for x, g in zip(found.inputs, found.gradients, strict=True))
    expected = squared.sum(1 if side == "left" else 0)
    problem = found.problem_of(name)
    close(getattr(problem, side).diagonal, expected / expected.mean(), 1e-10)
    assert getattr(problem, "right" if side == "left" else "left").is_identity


def test_dead_outputs_keep_a_floor_of_the_mean_row():
    weights = LAYERS["dead-tall"].problem_of("fwsvd").left.diagonal
    assert weights[::4].tolist() == [1e-6] * 5
    assert weights.mean() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", ["fwsvd", "fwsvd-columns"])
def test_fisher_of_nothing_is_refused(name):
    moments = LAYERS["tall"].moments
    moments["fisher"].rows.zero_()
    moments["fisher"].columns.zero_()
    with pytest.raises(NumericalError, match=r"every gradient of this site is zero.*--ignore"):
        method_named(name).metric(LAYERS["tall"].weight, moments)


@every_regular_layer
@pytest.mark.parametrize("name", ["drone", "svd-llm"])
def test_drone_is_whitening_is_output_pca(name, found):
    gram = found.moments["gram"].mean
    problem = found.problem_of(name)
    for rank in some_ranks(problem):
        answer = answer_of(problem, rank)
        close(answer, cholesky_whitening(found.weight, gram, rank), 1e-8)
        close(answer, output_pca(found, rank), 1e-8)


def cholesky_whitening(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> torch.Tensor:
    """SVD-LLM as its paper writes it: truncate the SVD of `W S`, `S S^T = G`, and multiply by `S^-1`."""
    whitener = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(weight @ whitener, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank] @ torch.linalg.inv(whitener)


def output_pca(found, rank: int) -> torch.Tensor:
    """Project the layer's outputs on the directions in which they are largest."""
    outputs = found.inputs.reshape(-1, found.weight.shape[1]) @ found.weight.mT
    directions = torch.linalg.svd(outputs, full_matrices=False)[2][:rank]
    return directions.mT @ directions @ found.weight


def test_drone_is_the_least_error_of_the_outputs():
    found = LAYERS["wide"]
    problem = found.problem_of("drone")
    rows = found.inputs.reshape(-1, 20)
    for rank in ranks_of(problem):
        answer = answer_of(problem, rank)
        outputs = (rows @ (found.weight - answer).mT).square().sum(1).mean()
        assert error_of(problem, answer) == pytest.approx(float(outputs), rel=1e-9, abs=1e-14)


def test_asvd_scales_by_the_root_of_the_mean_magnitude():
    found = LAYERS["tall"]
    scale = found.inputs.reshape(-1, 12).abs().mean(0).sqrt()
    u, s, v = torch.linalg.svd(found.weight * scale, full_matrices=False)
    close(answer_of(found.problem_of("asvd"), 5), u[:, :5] * s[:5] @ v[:5] / scale, 1e-9)


@pytest.mark.parametrize("name", ["kfac", "eckart"])
def test_kfac_is_two_sided_token_wise_and_shrunk_as_published(name):
    found = LAYERS["tall"]
    problem = found.problem_of(name)
    for metric, rows, amount in (
        (problem.left, found.gradients.reshape(-1, 20), 0.3),
        (problem.right, found.inputs.reshape(-1, 12), 0.1),
    ):
        full = rows.mT @ rows / len(rows)
        shrunk = (1 - amount) * full + amount * full.trace() / len(full) * torch.eye(len(full), dtype=torch.float64)
        close(metric.matrix, shrunk, 1e-12)


def test_centered_metric_is_the_covariance():
    """With the means in the bias, the best bias is `b + (W - W') mu` and what is left is the covariance."""
    found = LAYERS["tall"]
    moments = found.moments
    moments.centered = True
    rows = found.inputs.reshape(-1, 12)
    close(moments.input_gram, torch.cov(rows.mT, correction=0), 1e-10)
    problem = Problem(found.weight, right=Metric(full=moments.input_gram))
    change = found.weight - answer_of(problem, 4)
    outputs = rows @ change.mT
    best_bias = outputs.mean(0)
    assert error_of(problem, found.weight - change) == pytest.approx(
        float((outputs - best_bias).square().sum(1).mean()), rel=1e-9
    )


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_presets_are_known(method):
    assert METHODS[method.name] is method
    assert method.form in FORMS
    assert method.allocation in ("uniform", "loss", "paper")
    assert (method.allocation == "paper") == (method.paper_sizes is not None)
    assert method.needs <= set(STATISTICS)
    assert all((method.title, method.paper, method.exact_for))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_reads_only_the_statistics_it_says_it_needs(method):
    full = LAYERS["tall"].moments
    given_only = full.with_statistics({name: full[name] for name in ("mean", *method.needs)})
    problem = method.metric(LAYERS["tall"].weight, given_only)
    assert torch.equal(answer_of(problem, 4), answer_of(LAYERS["tall"].problem_of(method), 4))


# -- statistics --------------------------------------------------------------------------------------


def statistics(found, parts: int) -> Moments:
    """Of the layer's sequences, in so many batches."""
    rows, columns = found.weight.shape
    moments = Moments.empty({"gram", "absolute", "gradients"})
    for inputs, gradients in zip(found.inputs.chunk(parts), found.gradients.chunk(parts), strict=True):
        for statistic in moments.shared.values():
            statistic.update(inputs.reshape(-1, columns))
        moments["gradients"].update(gradients.reshape(-1, rows))
    moments.statistics["fisher"] = found.moments["fisher"]
    moments.sequences = len(found.inputs)
    return moments


@every_regular_layer
@every_method
def test_one_batch_many_batches_and_merged_are_one(method, centered, found):
    halves = [
        layer_of(found, slice(0, 3)),
        layer_of(found, slice(3, None)),
    ]
    merged = statistics(halves[0], 1)
    other = statistics(halves[1], 1)
    merged.sequences += other.sequences
    for name, statistic in merged.statistics.items():
        statistic.merge(other[name])
    expected = answer_of(found.problem_of(method, centered), 4)
    for moments in (statistics(found, 1), statistics(found, 8), merged):
        moments.centered = centered
        assert moments.sequences == 8
        close(answer_of(method.metric(found.weight, moments), 4), expected, 2e-5)


def layer_of(found, part: slice):
    """The layer as another process saw it."""
    return type(found)(found.weight, found.inputs[part], found.gradients[part])


# -- storing -----------------------------------------------------------------------------------------


@every_form
@every_regular_layer
@every_method
def test_stored_form_holds_the_answer_at_the_declared_size(method, centered, found, form):
    problem = found.problem_of(method, centered)
    rows, columns = problem.target.shape
    solved, before = factorize(problem), scale_of(problem)
    for rank in range(1, min(rows, columns) + 1):
        left, right = solved.truncated(rank)
        with unchanged(left, right):
            module = stored(form, left, right)
        close(module.to_dense(), left @ right, 1e-9)
        assert sum(t.numel() for t in module.state_dict().values()) == module.size(rows, columns, rank).parameters
        error = error_of(problem, module.to_dense().detach())
        assert error <= before + 1e-12
        before = error
    close(module.to_dense(), problem.target, 1e-8)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"]
)
@every_form
@pytest.mark.parametrize("name", REGULAR)
@every_method
def test_stored_in_lower_precision(method, centered, name, form, dtype, tolerance):
    found = LAYERS[name]
    problem = found.with_weight(found.weight.to(dtype)).problem_of(method, centered)
    full = min(problem.target.shape)
    for rank in (full // 2, full):
        left, right = factorize(problem).truncated(rank)
        assert left.dtype == torch.float32
        module = FORMS[form](problem.target.shape[1], problem.target.shape[0], rank, False).to(dtype)
        assert module.store(left, right, None) is None
        expected = answer_of(found.with_weight(found.weight.to(dtype).double()).problem_of(method, centered), rank)
        close(module.to_dense(), expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_layer
@every_method
def test_single_precision_keeps_the_target_and_the_curve(method, centered, found, dtype):
    weight = found.weight.to(dtype)
    exact = factorize(found.with_weight(weight.double()).problem_of(method, centered))
    solved = factorize(found.with_weight(weight).problem_of(method, centered))
    close(solved.left @ solved.right, weight.float(), 1e-4)
    close(solved.curve, exact.curve, 1e-5)


@every_form
@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
def test_declared_sizes_add_up_over_a_plan(form, keep):
    shapes = {"a": (64, 48), "b": (48, 64), "c": (40, 40)}
    choices = uniform(shapes, keep, form)
    built = {
        name: stored(form, normal(rows, choices[name].rank), normal(choices[name].rank, columns))
        for name, (rows, columns) in shapes.items()
    }
    numbers = sum(t.numel() for module in built.values() for t in module.state_dict().values())
    dense = sum(rows * columns for rows, columns in shapes.values())
    assert numbers == stored_elements(choices, shapes) <= keep * dense


@every_method
def test_deliberately_broken_solvers_are_told_apart(method, centered):
    """The checks above have teeth: each of these wrong answers is worse by far more than their tolerances."""
    found = layer(16, 14, decay=0.95)
    problem = found.problem_of(method, centered)
    rank, scale = 6, scale_of(problem)
    best = error_of(problem, answer_of(problem, rank))
    broken = {"rank off by one": answer_of(problem, rank - 1)}
    if not problem.right.is_identity:
        broken["right metric dropped"] = answer_of(Problem(problem.target, problem.left), rank)
    if not problem.left.is_identity:
        broken["left metric dropped"] = answer_of(Problem(problem.target, right=problem.right), rank)
    for name, answer in broken.items():
        assert error_of(problem, answer) > best + 1e-6 * scale, name
    assert curve_under(factorize(problem), problem)[rank] == pytest.approx(best, rel=1e-6)
