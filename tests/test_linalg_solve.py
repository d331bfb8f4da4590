"""Decompositions that check their input and say when they fell back; metrics; the solver; pivoting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import LAYERS, answer_of, close, error_of, few_examples, layers, normal, unchanged, with_spectrum

from eckart.errors import NumericalError, UsageError
from eckart.linalg import (
    Factorization,
    Metric,
    Problem,
    checked_eigh,
    checked_svd,
    curve_under,
    factorize,
    pivoted_factors,
    require_finite,
    weighted_error,
)
from eckart.linalg.blocks import blocks, symmetrize
from eckart.linalg.metric import sandwich
from eckart.linalg.pivot import MAXVOL_TOLERANCE


def gram(size: int, rank: int, seed: int = 0) -> torch.Tensor:
    rows = normal(rank, size, seed=seed)
    return rows.mT @ rows


def failing(times: int, function):
    """`function`, which fails to converge the first few times."""
    calls = {"left": times}

    def call(*args, **kwargs):
        if calls["left"]:
            calls["left"] -= 1
            raise torch.linalg.LinAlgError("did not converge")
        return function(*args, **kwargs)

    return call


# -- decompositions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("check", [lambda m: require_finite(m, "h.0.q"), lambda m: checked_eigh(m, "h.0.q")])
def test_not_finite_names_tensor_count_and_remedy(check, bad):
    matrix = torch.eye(4)
    matrix[0, 0] = matrix[2, 3] = bad
    with pytest.raises(NumericalError, match=r"h\.0\.q: 2 of 16 entries .* load the model in float32"):
        check(matrix)


def test_not_finite_is_refused_by_the_solver_on_either_side():
    broken = torch.full((3, 3), float("nan"))
    with pytest.raises(NumericalError, match="proj: 1 of 6"):
        factorize(Problem(torch.tensor([[1, 2, float("nan")], [4, 5, 6]])), "proj")
    for problem in (
        Problem(torch.eye(3), right=Metric(full=broken)),
        Problem(torch.eye(3), left=Metric(full=broken)),
        Problem(torch.eye(3), Metric(full=broken), Metric(full=torch.eye(3))),
        Problem(torch.eye(3), Metric(full=torch.eye(3)), Metric(full=broken)),
    ):
        with pytest.raises(NumericalError, match="proj"):
            factorize(problem, "proj")


def test_a_sum_that_overflows_is_no_refusal():
    require_finite(torch.full((4,), 3e38), "sum overflows, entries do not")


BLOCK = 32


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Matrices are handled in blocks of so many columns, so that small ones need several."""
    monkeypatch.setattr(blocks, "__defaults__", (BLOCK,))


@pytest.mark.parametrize("size", [1, 5, BLOCK, BLOCK + 3, 2 * BLOCK + 1])
@pytest.mark.usefixtures("narrow_blocks")
def test_symmetrizing_by_blocks_is_the_mean_with_the_transpose(size):
    matrix = normal(size, size)
    expected = (matrix + matrix.mT) / 2
    symmetrize(matrix)
    assert torch.equal(matrix, expected)
    assert [i for part in blocks(size) for i in range(size)[part]] == list(range(size))


def test_eigh_leaves_its_matrix():
    """It works in place, on a copy: of matrices of any dtype and layout."""
    for matrix in (gram(6, 9), gram(6, 9).mT, gram(6, 9).float(), gram(12, 9)[::2, ::2]):
        with unchanged(matrix):
            values, vectors, _ = checked_eigh(matrix)
        close(vectors * values @ vectors.mT, matrix.double(), 1e-6 if matrix.dtype == torch.float32 else 1e-12)
        assert bool((values[1:] <= values[:-1]).all())


def test_eigh_falls_back_and_says_so(monkeypatch):
    matrix = gram(6, 4)
    values, vectors, notes = checked_eigh(matrix, "site")
    assert notes == ()
    monkeypatch.setattr(torch.linalg, "eigh", failing(1, torch.linalg.eigh))
    again, others, notes = checked_eigh(matrix, "site")
    assert len(notes) == 1
    assert notes[0].startswith("site: eigh did not converge")
    close(again, values, 1e-12)
    close(others * again @ others.mT, vectors * values @ vectors.mT, 1e-12)


@pytest.mark.parametrize("failures", [1, 2], ids=["as it is", "transposed"])
def test_svd_falls_back_and_says_so(monkeypatch, failures):
    matrix = normal(5, 8)
    expected = torch.linalg.svdvals(matrix)
    monkeypatch.setattr(torch.linalg, "svd", failing(failures, torch.linalg.svd))
    left, values, right, notes = checked_svd(matrix, "site")
    assert len(notes) == 1
    assert notes[0].startswith("site: svd did not converge")
    close(values, expected, 1e-12)
    close(left * values @ right, matrix, 1e-12)


def test_a_matrix_that_no_solver_decomposes_is_refused(monkeypatch):
    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, failing(99, None))
    for decompose in (checked_eigh, checked_svd):
        with pytest.raises(NumericalError, match=r"site: neither eigh nor svd converged.*--ignore"):
            decompose(torch.eye(3), "site")


def test_fallback_reaches_the_notes_of_a_factorization(monkeypatch):
    problem = LAYERS["tall"].problem_of("kfac")
    expected = answer_of(problem, 3)
    monkeypatch.setattr(torch.linalg, "eigh", failing(1, torch.linalg.eigh))
    solved = factorize(problem, "h.1.mlp")
    assert [note for note in solved.notes if "h.1.mlp" in note and "eigh did not converge" in note]
    left, right = solved.truncated(3)
    close(left @ right, expected, 1e-9)


# -- metrics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "kind"),
    [
        (Metric(), "identity"),
        (Metric(diagonal=torch.tensor([1.0, 2, 3])), "diagonal"),
        (Metric(diagonal=torch.tensor([1.0, 0, 3])), "general"),
        (Metric(full=gram(3, 9)), "triangular"),
        (Metric(full=gram(3, 2)), "general"),
        (Metric(full=torch.zeros(3, 3)), "general"),
    ],
)
def test_root_times_its_transpose_is_the_metric(metric, kind):
    root = metric.root()
    assert (root.kind, root.invertible) == (kind, kind != "general")
    identity = torch.eye(3, dtype=torch.float64)
    half = root.right_of(identity)
    full = metric.times(identity)
    close(half @ half.mT, full, 1e-12)
    if root.invertible:
        close(root.solve_right(half), identity, 1e-9)


def test_root_of_a_wide_singular_metric_is_taken_in_its_own_precision(monkeypatch):
    for module in ("metric", "decompose"):
        monkeypatch.setattr(f"eckart.linalg.{module}.WIDE", 16)
    full = gram(20, 30)
    full[3], full[:, 3] = 0, 0
    root = Metric(full=full).root(inverted=False)
    assert (root.kind, root.values.dtype) == ("general", torch.float32)
    close(root.values.double() @ root.values.double().mT, full, 1e-5)


def test_a_metric_that_is_singular_but_for_rounding_is_not_inverted():
    full = torch.diag(torch.tensor([1.0, 1.0, 1e-14], dtype=torch.float64))
    assert Metric(full=full).root().kind == "general"
    assert Metric(full=full).root(inverted=False).kind == "triangular"


def test_shrinkage_is_the_published_one_and_leaves_the_metric_alone():
    full = gram(4, 2)
    with unchanged(full):
        shrunk = Metric(full=full).shrunk(0.3).matrix
    mean = full.diagonal().mean()
    close(shrunk, 0.7 * full + 0.3 * mean * torch.eye(4, dtype=torch.float64), 1e-14)
    assert float(torch.linalg.cond(shrunk)) <= 1 + 0.7 * 4 / 0.3


MEAN = normal(9, seed=5) / 9
PARTS = {
    "full": Metric(full=gram(9, 9)),
    "scaled": Metric(full=gram(9, 20), scale=0.05),
    "ridge": Metric(full=gram(9, 4), scale=0.25, ridge=0.3),
    "centered": Metric(full=gram(9, 20), scale=0.05, mean=MEAN),
    "centered ridge": Metric(full=gram(9, 20), scale=0.05, mean=MEAN, ridge=0.2),
    "diagonal": Metric(diagonal=normal(9).abs()),
}


def formed(metric: Metric) -> torch.Tensor:
    if metric.diagonal is not None:
        return torch.diag(metric.diagonal)
    mean = torch.zeros(9, dtype=torch.float64) if metric.mean is None else metric.mean
    return metric.scale * metric.full - torch.outer(mean, mean) + metric.ridge * torch.eye(9, dtype=torch.float64)


@pytest.mark.parametrize("metric", PARTS.values(), ids=PARTS)
def test_a_metric_in_parts_is_the_matrix_that_it_stands_for(metric):
    expected, probe = formed(metric), normal(9, 4, seed=2)
    with unchanged(*(part for part in (metric.full, metric.diagonal, metric.mean) if part is not None), probe):
        close(metric.matrix, expected, 1e-14)
        close(metric.dense(torch.float32), expected.float(), 1e-6)
        close(metric.times(probe), expected @ probe, 1e-14)
        close(metric.times(probe.float()), (expected @ probe).float(), 1e-6)
        close(sandwich(metric, probe), probe.mT @ expected @ probe, 1e-13)
        assert metric.mean_diagonal == pytest.approx(float(expected.diagonal().mean()), rel=1e-12)
        shrunk = metric.shrunk(0.3).shrunk(0.1)
        once = 0.7 * expected + 0.3 * metric.mean_diagonal * torch.eye(9, dtype=torch.float64)
        close(shrunk.matrix, 0.9 * once + 0.1 * metric.mean_diagonal * torch.eye(9, dtype=torch.float64), 1e-13)
        root = shrunk.root()
        half = root.right_of(torch.eye(9, dtype=torch.float64))
        close(root.times(half.mT), shrunk.matrix, 1e-12)
        close(root.to(torch.float32).times(probe.float()), (half @ probe).float(), 1e-5)
    matrix = metric.matrix
    matrix.zero_()
    assert bool(metric.matrix.any())


def test_shrinking_and_scaling_copy_nothing():
    full = gram(9, 20)
    assert Metric(full=full, mean=MEAN).shrunk(0.3).full is full


@pytest.mark.usefixtures("narrow_blocks")
def test_metrics_wider_than_a_block():
    size = BLOCK + 70
    full, error = gram(size, 40) / 40, normal(3, size)
    metric = Metric(full=full, scale=0.5, mean=normal(size) / size, ridge=0.1)
    expected = metric.matrix
    close(metric.times(error.mT), expected @ error.mT, 1e-13)
    close(metric.times(error.mT.float()), (expected @ error.mT).float(), 1e-5)
    close(weighted_error(error, Metric(), metric), (error @ expected @ error.mT).trace(), 1e-12)
    close(weighted_error(error.mT, metric, Metric()), (error @ expected @ error.mT).trace(), 1e-12)
    close(sandwich(Metric(full=gram(3, 5)), error), error.mT @ gram(3, 5) @ error, 1e-13)


def test_weighted_error_is_the_trace():
    error, left, right = normal(3, 4), gram(3, 3), gram(4, 4)
    trace = (left @ error @ right @ error.mT).trace()
    close(weighted_error(error, Metric(full=left), Metric(full=right)), trace, 1e-13)


# -- the solver --------------------------------------------------------------------------------------


def whitened_answer(problem: Problem, rank: int) -> torch.Tensor:
    """The textbook answer: both square roots by eigenvectors, one SVD, both inverses."""
    left, left_inverse = eigen_roots(problem.left.matrix)
    right, right_inverse = eigen_roots(problem.right.matrix)
    u, s, v = torch.linalg.svd(left @ problem.target @ right, full_matrices=False)
    return left_inverse @ (u[:, :rank] * s[:rank] @ v[:rank]) @ right_inverse


def eigen_roots(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.sqrt() @ vectors.mT, vectors / values.sqrt() @ vectors.mT


@few_examples
@given(found=layers(), share=st.floats(0, 1))
def test_two_sided_optimum_is_the_whitened_svd(found, share):
    problem = found.problem_of("kfac")
    rank = round(share * min(problem.target.shape))
    expected = whitened_answer(problem, rank)
    # Compared by error: equal singular values leave the answer itself open.
    total = error_of(problem, torch.zeros_like(expected))
    assert error_of(problem, answer_of(problem, rank)) == pytest.approx(
        error_of(problem, expected), rel=1e-9, abs=1e-11 * total
    )


@pytest.mark.parametrize("name", ["tall", "wide", "square"])
def test_two_sided_answer_is_the_whitened_svd(name):
    problem = LAYERS[name].problem_of("kfac")
    for rank in range(1, min(problem.target.shape) + 1):
        close(answer_of(problem, rank), whitened_answer(problem, rank), 1e-9)


SIDES = {
    "none": lambda size: Metric(),
    "diagonal": lambda size: Metric(diagonal=normal(size, seed=1).abs() + 0.1),
    "diagonal with a zero": lambda size: Metric(diagonal=(torch.arange(size) % 3).double()),
    "full": lambda size: Metric(full=gram(size, 3 * size)),
    "singular": lambda size: Metric(full=gram(size, size // 2)),
}


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)], ids=str)
@pytest.mark.parametrize("right", SIDES)
@pytest.mark.parametrize("left", SIDES)
def test_every_pair_of_metrics(left, right, shape):
    problem = Problem(normal(*shape), SIDES[left](shape[0]), SIDES[right](shape[1]))
    solved = factorize(problem, "site")
    close(solved.left @ solved.right, problem.target, 1e-6)
    singular = {"singular", "diagonal with a zero"}
    # Only a metric that had to be shrunk may be off by as much as it was shrunk, and then it is said.
    tolerance = 1e-6 if solved.notes else 1e-10
    assert bool(solved.notes) == ({left, right} <= singular)
    exact = explicit_tails(problem)
    for rank in range(min(shape) + 1):
        measured = error_of(problem, answer_of(problem, rank))
        assert measured == pytest.approx(float(exact[rank]), abs=tolerance * float(exact[0]))
        assert float(solved.curve[rank]) == pytest.approx(measured, abs=tolerance * float(exact[0]))


def explicit_tails(problem: Problem) -> torch.Tensor:
    """Tail sums of the squared singular values of `L T R`."""
    rows, columns = problem.target.shape
    left, right = (
        metric.root().right_of(torch.eye(size, dtype=torch.float64))
        for metric, size in ((problem.left, rows), (problem.right, columns))
    )
    squared = torch.linalg.svdvals(left.mT @ problem.target @ right).square()
    return torch.cat([squared.flip(0).cumsum(0).flip(0), squared.new_zeros(1)])


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_zero_metric_still_reproduces_the_target(side):
    zero = Metric(full=torch.zeros(6, 6, dtype=torch.float64))
    other = Metric(full=gram(6, 12))
    problem = Problem(normal(6, 6), other if side == "right" else zero, other if side == "left" else zero)
    solved = factorize(problem, "site")
    close(solved.left @ solved.right, problem.target, 1e-9)
    assert not solved.curve.any()
    assert any("its metric is zero" in note for note in solved.notes) or side != "both"


def test_tall_target_with_fewer_tokens_than_features_keeps_what_the_data_did_not_show():
    """At full size nothing may be lost, although the metric sees two directions only."""
    problem = Problem(normal(20, 12), right=Metric(full=gram(12, 2)))
    close(answer_of(problem, 12), problem.target, 1e-10)
    # The first two directions carry all of the measured error, the next ones the plain SVD of the rest.
    assert error_of(problem, answer_of(problem, 2)) <= 1e-12 * error_of(problem, 0 * problem.target)


@pytest.mark.parametrize("measured_in", ["svd", "drone", "kfac", "fwsvd"])
@pytest.mark.parametrize("solved_in", ["svd", "asvd", "kfac"])
@pytest.mark.parametrize("name", ["tall", "wide", "few-tokens-tall", "rank-deficient-wide"])
def test_curve_under_another_metric_is_the_measured_error(name, solved_in, measured_in):
    solved = factorize(LAYERS[name].problem_of(solved_in))
    problem = LAYERS[name].problem_of(measured_in)
    curve = curve_under(solved, problem)
    direct = [error_of(problem, left @ right) for left, right in map(solved.truncated, range(len(curve)))]
    close(curve, torch.tensor(direct, dtype=torch.float64), 1e-9)


@pytest.mark.usefixtures("narrow_blocks")
def test_curve_of_more_ranks_than_a_block():
    rank = BLOCK + 50
    solved = Factorization((normal(rank, rank), normal(rank, rank, seed=1)), torch.ones(rank, dtype=torch.float64))
    rows, columns = normal(9, rank, seed=2), normal(7, rank, seed=3)
    problem = Problem(normal(rank, rank, seed=4), Metric(full=rows.mT @ rows), Metric(full=columns.mT @ columns))
    curve = curve_under(solved, problem)
    for k in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, rank):
        left, right = solved.truncated(k)
        direct = (rows @ (problem.target - left @ right) @ columns.mT).square().sum()
        assert float(curve[k]) == pytest.approx(float(direct), rel=1e-9)


@pytest.mark.parametrize("solved_in", ["svd", "kfac", "drone"])
@pytest.mark.parametrize("name", ["tall", "wide", "few-tokens-tall", "few-tokens-wide"])
def test_kept_factors_are_the_first_of_all(name, solved_in):
    """Also past the directions that the metric sees, and in memory of their own."""
    problem = LAYERS[name].problem_of(solved_in)
    whole, size = factorize(problem), min(problem.target.shape)
    for limit in (0, 1, size - 1, size, size + 5):
        kept = factorize(problem).kept(limit)
        assert kept.completion is None
        assert torch.equal(kept.squared, whole.squared)
        assert torch.equal(kept.curve, whole.curve)
        for part in kept.seen_factors:
            assert part.is_contiguous()
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
        for rank in range(min(limit, size) + 1):
            for mine, other in zip(kept.truncated(rank), whole.truncated(rank), strict=True):
                close(mine, other, 1e-12)
        assert kept.left.shape[1] == min(limit, size)
        assert len(curve_under(kept, problem)) == min(limit, size) + 1
        with pytest.raises(UsageError, match=rf"rank {size + 6}: .* kept up to rank {min(limit, size)}\. Ask for"):
            kept.mirrored.truncated(size + 6)


def test_effective_rank_is_the_exponential_of_the_entropy():
    assert factorize(Problem(torch.eye(5, dtype=torch.float64))).effective_rank == pytest.approx(5)
    one = with_spectrum(6, 5, torch.tensor([3.0, 0, 0], dtype=torch.float64))
    assert factorize(Problem(one)).effective_rank == pytest.approx(1)
    assert factorize(Problem(torch.zeros(4, 3))).effective_rank == pytest.approx(1)


def test_the_transposed_problem_has_the_transposed_answer():
    problem = LAYERS["tall"].problem_of("kfac")
    close(answer_of(problem.mirrored, 4).mT, answer_of(problem, 4), 1e-9)
    mirrored = factorize(problem).mirrored
    close((mirrored.left[:, :4] @ mirrored.right[:4]).mT, answer_of(problem, 4), 1e-12)


# -- pivoting ----------------------------------------------------------------------------------------


def kahan(rows: int, columns: int) -> torch.Tensor:
    """Rows graded so that partial pivoting sees no reason to exchange any of them."""
    cosine = 0.6
    sine = (1 - cosine**2) ** 0.5
    upper = torch.eye(columns, dtype=torch.float64) - cosine * torch.triu(
        torch.ones(columns, columns, dtype=torch.float64), 1
    )
    graded = sine ** torch.arange(columns, dtype=torch.float64)[:, None] * upper
    return torch.cat([graded, 0.5 * normal(rows - columns, columns)])


def growing(rows: int, columns: int) -> torch.Tensor:
    """Wilkinson's matrix: partial pivoting lets its entries double at every step."""
    square = torch.eye(rows, dtype=torch.float64) - torch.tril(torch.ones(rows, rows, dtype=torch.float64), -1)
    square[:, -1] = 1
    return torch.cat([square[:, : columns - 1], square[:, -1:]], 1)


HARD = {
    "random": normal(60, 20),
    "graded rows": normal(60, 20) * torch.logspace(0, -12, 60, dtype=torch.float64)[:, None],
    "graded columns": normal(60, 20) * torch.logspace(0, -9, 20, dtype=torch.float64),
    "graded rows, smallest first": normal(60, 20) * torch.logspace(-12, 0, 60, dtype=torch.float64)[:, None],
    "kahan": kahan(60, 20),
    "growing": growing(60, 20),
    "repeated rows": normal(20, 20).repeat(3, 1),
    "one column": normal(30, 1),
    "square": normal(20, 20),
    "one row large": torch.cat([1e6 * normal(1, 20), normal(59, 20)]),
}


@pytest.mark.parametrize("left", HARD.values(), ids=HARD)
def test_pivoting_is_exact_and_keeps_the_coefficients_small(left):
    rows, rank = left.shape
    right = normal(rank, 15, seed=9)
    with unchanged(left, right):
        factors = pivoted_factors(left, right)
    assert factors.bound <= MAXVOL_TOLERANCE * (1 + 1e-9)
    assert factors.bound == (float(factors.rest.abs().max()) if rows > rank else 0)
    assert sorted(factors.order.tolist()) == list(range(rows))
    product = left @ right
    rebuilt = torch.empty_like(product)
    rebuilt[factors.order] = torch.cat([factors.pivots, factors.rest @ factors.pivots])
    close(rebuilt, product, 1e-9)
    assert torch.equal(factors.pivots, left[factors.order[:rank]] @ right)


@few_examples
@given(found=layers())
def test_pivoting_of_any_shape(found):
    rows, columns = found.weight.shape
    rank = min(rows, columns)
    factors = pivoted_factors(normal(rows, rank, seed=columns), normal(rank, columns))
    assert factors.bound <= MAXVOL_TOLERANCE * (1 + 1e-9)


@pytest.mark.parametrize("rank", [1, 3])
def test_pivoting_of_a_deficient_basis_has_no_bound(rank):
    left = normal(12, 4)
    left[:, rank:] = left[:, :1]
    assert pivoted_factors(left, normal(4, 6)).bound == float("inf")
    assert pivoted_factors(torch.zeros(12, 4), normal(4, 6)).bound == float("inf")


@pytest.mark.parametrize("shape", [(96, 96), (128, 80), (80, 128)])
@pytest.mark.parametrize("two_sided", [False, True])
def test_wide_float32_problems_are_decomposed_in_float32_and_lose_nothing(shape, two_sided, monkeypatch):
    """The stored factors of every rank are as good, by the error measured in float64, as those of float64."""
    m, n = shape
    stream = torch.Generator().manual_seed(5)
    weight = torch.randn(m, n, generator=stream)
    inputs = torch.randn(4 * n, n, generator=stream) * torch.linspace(1, 0.02, n)
    outputs = torch.randn(4 * m, m, generator=stream) * torch.linspace(1, 0.1, m)
    left = Metric(full=outputs.mT @ outputs / (4 * m)).shrunk(0.3) if two_sided else Metric()
    right = Metric(full=inputs.mT @ inputs / (4 * n)).shrunk(0.1 if two_sided else 0.0)
    problem = Problem(weight, left, right)
    exact = factorize(problem)
    monkeypatch.setattr("eckart.linalg.decompose.WIDE", 16)
    monkeypatch.setattr("eckart.linalg.metric.WIDE", 16)
    quick = factorize(problem)
    assert not torch.equal(quick.truncated(8)[0], exact.truncated(8)[0]), "nothing was done otherwise"
    measured = [
        Metric(full=metric.dense(torch.float64)) if not metric.is_identity else metric for metric in (left, right)
    ]
    for rank in (4, 20, 60):
        errors = []
        for solved in (exact, quick):
            b, a = solved.truncated(rank)
            errors.append(float(weighted_error(weight.double() - b.double() @ a.double(), *measured)))
        assert errors[1] == pytest.approx(errors[0], rel=1e-4)
        assert float(quick.curve[rank]) == pytest.approx(errors[0], rel=1e-3)
