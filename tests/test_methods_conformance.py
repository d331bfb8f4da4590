"""What every registered method must hold, in the form of its paper; a new one is tested without new code.

Methods that share a metric and a form's solver are one case: the first of them stands for all.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    LAYERS,
    answer_of,
    close,
    error_of,
    every_regular_layer,
    few_examples,
    layer,
    layers,
    normal,
    unchanged,
)

import eckart
from eckart.errors import NumericalError
from eckart.forms import FORMS, Block, FactoredLinear, form_named
from eckart.linalg import Factorization, Metric, Problem
from eckart.methods import METHODS, Method, method_named
from eckart.methods.kfac import robust_metric
from eckart.moments import Moments
from eckart.registry import STATISTICS

# The pivoted form of full row rank has no rows left to combine.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

CANDIDATES = 40
SAME_ALGEBRA = {robust_metric: METHODS["kfac"].metric}
SOURCE = str(Path(eckart.__file__).parents[1])


@dataclass(frozen=True)
class Case:
    """A method as it is used: its metric, the means folded into the bias or not, and its own form."""

    method: Method
    centered: bool

    @property
    def form(self) -> type[FactoredLinear]:
        return form_named(self.method.form)

    def block(self, problem: Problem) -> Block | None:
        return self.form.blocks(*problem.target.shape)[0]

    def problem(self, found) -> Problem:
        return found.problem_of(self.method, self.centered)

    def solve(self, problem: Problem) -> Factorization:
        rows, columns = problem.target.shape
        block = self.block(problem)
        return self.form.solve(problem, block, self.form.full_rank(rows, columns, block), self.method.name)

    def dense(self, problem: Problem, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """W' of the factors."""
        columns = torch.eye(problem.target.shape[1], dtype=left.dtype)
        return self.form.times(left, right, columns, self.block(problem))

    def answer(self, problem: Problem, rank: int) -> torch.Tensor:
        return self.dense(problem, *self.solve(problem).truncated(rank))


def distinct_cases(*, stored: bool) -> dict[str, Case]:
    """One case for each metric, centering and solver, and for each way of storing the factors if `stored`."""
    cases: dict[tuple[object, ...], Case] = {}
    for method in METHODS.values():
        form = form_named(method.form)
        for centered in sorted({False, method.centered}):
            key = (
                SAME_ALGEBRA.get(method.metric, method.metric),
                centered,
                form.solve.__func__,
                form.store if stored else None,
            )
            cases.setdefault(key, Case(method, centered))
    return {case.method.name + ("-centered" if case.centered else ""): case for case in cases.values()}


CASES, STORED = distinct_cases(stored=False), distinct_cases(stored=True)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_stored_case = pytest.mark.parametrize("case", STORED.values(), ids=STORED)


def some_ranks(problem: Problem, full: int | None = None) -> list[int]:
    full = min(problem.target.shape) if full is None else full
    return sorted({rank for rank in (1, full // 3, full // 2, full - 1) if 1 <= rank <= full})


def scale_of(problem: Problem) -> float:
    """`|| L T R ||^2`, the error of giving nothing."""
    return error_of(problem, torch.zeros_like(problem.target))


# -- the solution ------------------------------------------------------------------------------------


@every_case
def test_full_size_is_the_target_and_each_rank_has_the_predicted_error(case):
    for name, found in LAYERS.items():
        problem = case.problem(found)
        solved, scale = case.solve(problem), scale_of(problem)
        full = len(solved.squared)
        close(case.dense(problem, solved.left, solved.right), problem.target, 1e-9)
        measured = [scale]
        measured += [error_of(problem, case.dense(problem, *solved.truncated(rank))) for rank in range(1, full + 1)]
        assert len(solved.curve) == full + 1, name
        assert float(solved.curve[-1]) == 0
        assert bool((solved.curve.diff() <= 0).all()), name
        assert solved.curve.tolist() == pytest.approx(measured, rel=0, abs=1e-10 * scale), name
        assert max((b - a for a, b in itertools.pairwise(measured)), default=0) <= 1e-12 * scale, name


@every_case
def test_no_other_factors_of_that_rank_are_better(case):
    for found in LAYERS.values():
        problem = case.problem(found)
        solved = case.solve(problem)
        for rank in some_ranks(problem, len(solved.squared))[::2]:
            error = error_of(problem, case.dense(problem, *solved.truncated(rank)))
            assert error <= best_candidate(case, problem, solved, rank) + 1e-9 * scale_of(problem)


def best_candidate(case: Case, problem: Problem, solved: Factorization, rank: int) -> float:
    """The least error of the same form without a metric and of others, half of them small steps away."""
    plain = error_of(problem, case.answer(Problem(problem.target), rank))
    left, right = solved.truncated(rank)
    half = CANDIDATES // 2
    steps = 10.0 ** -torch.arange(half, dtype=torch.float64).remainder(6)[:, None, None]
    size = float(left.abs().max())
    lefts = torch.cat([normal(half, *left.shape, seed=1), left + size * steps * normal(half, *left.shape, seed=2)])
    rights = torch.cat([normal(half, *right.shape, seed=3), right + steps * normal(half, *right.shape, seed=4)])
    errors = [error_of(problem, case.dense(problem, b, right)) for b in lefts[half:]]
    errors += [error_of(problem, case.dense(problem, b, a)) for b, a in zip(lefts, rights, strict=True)]
    if case.block(problem) is None:  # with the best other factor they are hard to beat
        errors += [error_of(problem, b @ fit(problem, b)) for b in lefts[::2]]
        errors += [error_of(problem, (a.mT @ fit(problem.mirrored, a.mT)).mT) for a in rights[1:half:2]]
    return min(plain, *errors)


def fit(problem: Problem, left: torch.Tensor) -> torch.Tensor:
    """The best A for a given B: `(B^T H B)^+ B^T H T`."""
    weighted = problem.left.times(left)
    return torch.linalg.pinv(left.mT @ weighted, hermitian=True) @ (weighted.mT @ problem.target)


@every_case
def test_any_shape_spectrum_and_number_of_tokens(case):
    @few_examples
    @given(found=layers(), share=st.floats(0, 1))
    def check(found, share):
        problem = case.problem(found)
        solved, scale = case.solve(problem), scale_of(problem)
        rank = round(share * len(solved.squared))
        close(case.dense(problem, solved.left, solved.right), problem.target, 1e-8)
        error = error_of(problem, case.dense(problem, *solved.truncated(rank)))
        assert error == pytest.approx(float(solved.curve[rank]), abs=1e-10 * scale)
        if rank:
            assert error <= best_candidate(case, problem, solved, rank) + 1e-9 * scale

    check()


@every_case
def test_inputs_stay_and_bits_repeat(case):
    for found in (LAYERS["tall"], LAYERS["dead-wide"]):
        moments = found.moments
        moments.centered = case.centered
        statistics = [tensor for tensor in moments.state().values() if tensor.dim()]
        with unchanged(found.weight, *statistics):
            problem = case.method.metric(found.weight, moments)
            metrics = [m for side in (problem.left, problem.right) for m in (side.full, side.diagonal) if m is not None]
            with unchanged(*metrics):
                first, second = case.solve(problem), case.solve(case.problem(found))
        assert torch.equal(first.left, second.left)
        assert torch.equal(first.right, second.right)
        assert torch.equal(first.squared, second.squared)


@every_case
def test_single_precision_keeps_the_target_and_the_curve(case):
    for found in LAYERS.values():
        for dtype in (torch.float32, torch.bfloat16):
            weight = found.weight.to(dtype)
            exact = case.solve(case.problem(found.with_weight(weight.double())))
            problem = case.problem(found.with_weight(weight))
            solved = case.solve(problem)
            assert solved.left.dtype == torch.float32
            close(case.dense(problem, solved.left, solved.right), weight.float(), 1e-4)
            close(solved.curve, exact.curve, 1e-5)


@every_regular_layer
@every_stored_case
def test_stored_in_its_form_it_holds_the_answer(case, found):
    problem = case.problem(found)
    rows, columns = problem.target.shape
    solved, block, before = case.solve(problem), case.block(problem), scale_of(problem)
    for rank in range(1, len(solved.squared) + 1):
        factors = solved.truncated(rank)
        module = case.form.empty(rows, columns, rank, bias=False, block=block, dtype=torch.float64)
        with unchanged(*factors):
            assert module.store(*factors, None) is None
        close(module.to_dense(), case.dense(problem, *factors), 1e-9)
        error = error_of(problem, module.to_dense().detach())
        assert error <= before + 1e-12
        before = error
    half = len(solved.squared) // 2
    small = case.form.empty(rows, columns, half, bias=False, block=block, dtype=torch.bfloat16)
    assert small.store(*solved.truncated(half), None) is None
    close(small.to_dense(), case.answer(problem, half), 1e-2)


@every_case
def test_wrong_answers_are_told_apart(case):
    """The checks above have teeth: each of these is worse by far more than their tolerances."""
    problem = case.problem(layer(16, 14, decay=0.95))
    rank, scale = 6, scale_of(problem)
    best = error_of(problem, case.answer(problem, rank))
    broken = {"rank off by one": case.answer(problem, rank - 1)}
    if not problem.right.is_identity:
        broken["right metric dropped"] = case.answer(Problem(problem.target, problem.left), rank)
    if not problem.left.is_identity:
        broken["left metric dropped"] = case.answer(Problem(problem.target, right=problem.right), rank)
    for name, answer in broken.items():
        assert error_of(problem, answer) > best + 1e-6 * scale, name


@every_case
def test_errors_in_another_metric_are_measured_for_every_rank(case):
    found = LAYERS["tall"]
    problem, other = case.problem(found), found.problem_of("kfac")
    solved = case.solve(problem)
    block, limit = case.block(problem), len(solved.squared) - 1
    errors = case.form.errors_under(solved, other, block, limit)
    for rank in range(limit + 1):
        answer = case.dense(problem, *solved.truncated(rank)) if rank else torch.zeros_like(problem.target)
        assert float(errors[rank]) == pytest.approx(error_of(other, answer), rel=1e-6, abs=1e-12)


# -- symmetries --------------------------------------------------------------------------------------


@every_regular_layer
@every_case
def test_permuted_inputs_and_outputs_permute_the_answer(case, found):
    rows, columns = found.weight.shape
    outputs, inputs = normal(rows, seed=7).argsort(), normal(columns, seed=8).argsort()
    problem, permuted = case.problem(found), case.problem(found.take(outputs, inputs))
    for rank in some_ranks(problem):
        close(answer_of(permuted, rank), answer_of(problem, rank)[outputs][:, inputs], 1e-8)


def unshrunk_kfac(found) -> Problem:
    moments = found.moments
    return Problem(found.weight, Metric(full=moments["gradients"].mean), Metric(full=moments["gram"].mean))


RESCALABLE = {
    "drone": (lambda found: found.problem_of("drone"), False),
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
def test_drone_is_whitening_is_output_pca(found):
    assert METHODS["svd-llm"].metric is METHODS["basis-sharing"].metric is METHODS["drone"].metric
    gram = found.moments["gram"].mean
    problem = found.problem_of("drone")
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
    for rank in range(min(problem.target.shape) + 1):
        answer = answer_of(problem, rank)
        outputs = (rows @ (found.weight - answer).mT).square().sum(1).mean()
        assert error_of(problem, answer) == pytest.approx(float(outputs), rel=1e-9, abs=1e-14)


def test_asvd_scales_by_the_root_of_the_mean_magnitude():
    found = LAYERS["tall"]
    scale = found.inputs.reshape(-1, 12).abs().mean(0).sqrt()
    u, s, v = torch.linalg.svd(found.weight * scale, full_matrices=False)
    close(answer_of(found.problem_of("asvd"), 5), u[:, :5] * s[:5] @ v[:5] / scale, 1e-9)


def test_kfac_is_two_sided_token_wise_and_shrunk_as_published():
    assert METHODS["eckart"].metric is METHODS["kfac"].metric
    found = LAYERS["tall"]
    problem = found.problem_of("kfac")
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
def test_settings_are_known(method):
    assert METHODS[method.name] is method
    assert method.form in FORMS
    assert method.allocation in ("uniform", "loss", "paper")
    assert (method.allocation == "paper") == (method.paper_sizes is not None)
    assert method.needs <= set(STATISTICS)
    assert all((method.title, method.paper, method.exact_for))


IMPORT_LIGHT = """
import sys
from eckart.methods import METHODS
assert all(method.needs_data in (True, False) for method in METHODS.values())
loaded = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not loaded, loaded
"""


def test_the_table_of_methods_is_read_without_torch():
    subprocess.run([sys.executable, "-c", IMPORT_LIGHT], check=True, env={**os.environ, "PYTHONPATH": SOURCE})


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


@pytest.mark.parametrize(("method", "centered"), [(METHODS["eckart"], True), (METHODS["asvd"], False)])
def test_one_batch_many_batches_and_merged_are_one(method, centered):
    found = LAYERS["tall"]
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
