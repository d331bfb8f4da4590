"""One input factor for several weights, under the block-diagonal metric of their outputs."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import close, few_examples, layer, normal, unchanged

from eckart.errors import NumericalError, UsageError
from eckart.linalg import (
    BlockMetric,
    Factorization,
    Metric,
    Problem,
    checked_svd,
    curve_under,
    factorize,
    factorize_jointly,
    group_curve_under,
    stack_metrics,
    stack_problems,
    weighted_error,
)
from eckart.linalg.metric import sandwich

WIDTH = 10
TALL, GROUPED, WIDE, ONE = (12, 14), (16, 6, 6), (3, 4), (7,)
HEIGHTS = {"tall": TALL, "grouped queries": GROUPED, "wide": WIDE, "alone": ONE}


def gram(size: int, rank: int, seed: int = 0) -> torch.Tensor:
    rows = normal(rank, size, seed=seed)
    return rows.mT @ rows / rank


KINDS = {
    "none": lambda size, seed: Metric(),
    "diagonal": lambda size, seed: Metric(diagonal=normal(size, seed=seed).abs() + 0.1),
    "full": lambda size, seed: Metric(full=gram(size, 3 * size, seed)).shrunk(0.3),
    "singular": lambda size, seed: Metric(full=gram(size, max(size // 2, 1), seed)),
    "mixed": lambda size, seed: KINDS[("none", "diagonal", "full")[seed % 3]](size, seed),
}


def group(heights: Sequence[int], left: str = "full", right: str = "full", seed: int = 0) -> list[Problem]:
    inputs = KINDS[right](WIDTH, seed + 50)
    return [
        Problem(normal(height, WIDTH, seed=seed + i) / (i + 1), KINDS[left](height, seed + 10 + i), inputs)
        for i, height in enumerate(heights)
    ]


def error_of(problems: Sequence[Problem], answers: Sequence[torch.Tensor]) -> float:
    pairs = zip(problems, answers, strict=True)
    return sum(float(weighted_error(p.target - answer, p.left, p.right)) for p, answer in pairs)


def answers_of(solved: Sequence[Factorization], rank: int) -> list[torch.Tensor]:
    factors = [found.truncated(rank) for found in solved]
    assert all(torch.equal(right, factors[0][1]) for _, right in factors)
    return [left @ right for left, right in factors]


def formed(metric: Metric, size: int) -> torch.Tensor:
    return metric.times(torch.eye(size, dtype=torch.float64))


def root(matrix: torch.Tensor) -> torch.Tensor:
    """Symmetric, of a singular matrix too."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.mT


def explicit_tails(problems: Sequence[Problem]) -> torch.Tensor:
    """Tail sums of the squared singular values of the `L_i T_i R` stacked."""
    right = root(formed(problems[0].right, WIDTH))
    stacked = torch.cat([root(formed(p.left, len(p.target))) @ p.target @ right for p in problems])
    squared = torch.linalg.svdvals(stacked).square()
    return torch.cat([squared.flip(0).cumsum(0).flip(0), squared.new_zeros(1)])


# -- the metric of stacked outputs --------------------------------------------------------------------


MIXED = ([Metric(full=gram(3, 9)), Metric(), Metric(diagonal=normal(2).abs()), Metric(full=gram(4, 2))], (3, 2, 2, 4))


def test_a_block_metric_is_the_matrix_that_it_stands_for():
    metric = stack_metrics(*MIXED)
    assert isinstance(metric, BlockMetric)
    parts, heights = MIXED
    expected = torch.block_diag(*(formed(part, height) for part, height in zip(parts, heights, strict=True)))
    probe = normal(11, 4)
    close(metric.times(probe), expected @ probe, 1e-14)
    close(sandwich(metric, probe), probe.mT @ expected @ probe, 1e-13)
    close(weighted_error(probe, metric, Metric()), (probe.mT @ expected @ probe).trace(), 1e-13)
    close(metric.matrix, expected, 1e-14)
    assert metric.dense(torch.float32).dtype == torch.float32
    assert metric.mean_diagonal == pytest.approx(float(expected.diagonal().mean()), rel=1e-12)
    assert not metric.is_identity
    shrunk = metric.shrunk(0.3)
    close(shrunk.matrix, 0.7 * expected + 0.3 * metric.mean_diagonal * torch.eye(11, dtype=torch.float64), 1e-13)


def test_the_root_of_a_block_metric_is_one_of_every_block():
    eye, probe = torch.eye(11, dtype=torch.float64), normal(11, 4)
    metric = stack_metrics(*MIXED)
    singular = metric.root()
    assert [part.kind for part in singular.parts] == ["triangular", "identity", "diagonal", "general"]
    assert not singular.invertible
    for kind in (metric, metric.shrunk(0.3)):
        half = kind.root().right_of(eye)
        close(half @ half.mT, kind.matrix, 1e-12)
        close(kind.root().times(probe), half @ probe, 1e-12)
        assert kind.root().to(torch.float32).right_of(probe.mT.float()).dtype == torch.float32
    whole = metric.shrunk(0.3).root()
    assert whole.invertible
    close(whole.solve_right(whole.right_of(probe.mT)), probe.mT, 1e-9)


def test_stacked_metrics_are_of_the_simplest_kind():
    assert stack_metrics([Metric(), Metric()], [2, 3]).is_identity
    diagonal = stack_metrics([Metric(diagonal=torch.tensor([2.0, 3.0])), Metric()], [2, 3])
    assert torch.equal(diagonal.diagonal, torch.tensor([2.0, 3, 1, 1, 1]))
    assert BlockMetric(parts=(Metric(), Metric()), heights=(1, 2)).is_identity


def test_blocks_are_never_put_into_one_matrix(monkeypatch):
    def refuse(self, dtype):
        raise AssertionError("one large matrix")

    monkeypatch.setattr(BlockMetric, "dense", refuse)
    for heights in HEIGHTS.values():
        for right in KINDS:
            problems = group(heights, "full", right)
            group_curve_under(factorize_jointly(problems), problems)


# -- the solver --------------------------------------------------------------------------------------


@pytest.mark.parametrize("heights", HEIGHTS.values(), ids=HEIGHTS)
@pytest.mark.parametrize("right", ["none", "diagonal", "full", "singular"])
@pytest.mark.parametrize("left", KINDS)
def test_the_error_is_the_tail_of_the_stacked_singular_values(left, right, heights):
    problems = group(heights, left, right)
    with unchanged(*(problem.target for problem in problems)):
        solved = factorize_jointly(problems, "attn")
    tails = explicit_tails(problems)
    full = min(sum(heights), WIDTH)
    # Only a metric that had to be shrunk may be off by as much as it was shrunk, and then it is said.
    both = left == right == "singular"
    assert bool(solved[0].notes) <= both
    tolerance = 1e-6 if solved[0].notes else 1e-10
    assert all(not found.notes for found in solved[1:])
    for rank in range(full + 1):
        answers = answers_of(solved, rank)
        assert error_of(problems, answers) == pytest.approx(float(tails[rank]), abs=tolerance * float(tails[0]))
    for found in solved:
        close(found.curve, tails, tolerance)
    for answer, problem in zip(answers_of(solved, full), problems, strict=True):
        close(answer, problem.target, 1e-6)


@few_examples
@given(
    heights=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    rank=st.integers(1, 6),
    seed=st.integers(0, 99),
    left=st.sampled_from(["full", "diagonal", "none", "mixed"]),
    right=st.sampled_from(["full", "singular"]),
)
def test_no_other_factor_and_no_separate_factors_are_better(heights, rank, seed, left, right):
    problems = group(heights, left, right, seed)
    rank = min(rank, sum(heights), WIDTH)
    solved = factorize_jointly(problems)
    best = error_of(problems, answers_of(solved, rank))
    total = error_of(problems, [0 * problem.target for problem in problems])
    shared = solved[0].truncated(rank)[1]
    others = [normal(rank, WIDTH, seed=seed + 7)] + [
        shared + 10.0**-i * shared.norm() * normal(rank, WIDTH, seed=seed + i) for i in range(1, 5)
    ]
    # Every member's own optimal factor, offered to all.
    others += [factorize(p).right[:rank] for p in problems if len(p.target) >= rank]
    for other in others:
        assert error_of(problems, fitted(problems, other)) >= best * (1 - 1e-9) - 1e-11 * total
    # Of ranks that sum to the same number of rows of A, separate factors are of rank `rank` together.
    for split in ([rank] + [0] * (len(heights) - 1), [0] * (len(heights) - 1) + [rank]):
        pairs = zip(problems, split, strict=True)
        separate = [left @ right for p, k in pairs for left, right in [factorize(p).truncated(min(k, *p.target.shape))]]
        assert error_of(problems, separate) >= best * (1 - 1e-9) - 1e-11 * total


def fitted(problems: Sequence[Problem], basis: torch.Tensor) -> list[torch.Tensor]:
    """The best weights whose rows are in the span of a given A: no metric of the outputs matters for them."""
    weighted = problems[0].right.times(basis.mT)
    inverse = torch.linalg.pinv(basis @ weighted, hermitian=True, rtol=1e-10)
    return [problem.target @ weighted @ inverse @ basis for problem in problems]


@pytest.mark.parametrize("left", ["full", "none", "mixed"])
def test_members_may_come_in_any_order(left):
    problems = group(GROUPED, left)
    solved = factorize_jointly(problems)
    order = [2, 0, 1]
    other = factorize_jointly([problems[i] for i in order])
    for rank in (1, 4, WIDTH):
        expected = answers_of(solved, rank)
        for answer, i in zip(answers_of(other, rank), order, strict=True):
            close(answer, expected[i], 1e-9)
    close(other[0].squared, solved[0].squared, 1e-10)


def test_alone_it_is_the_ordinary_factorization():
    problems = group(ONE)
    (found,), expected = factorize_jointly(problems), factorize(problems[0])
    close(found.squared, expected.squared, 1e-12)
    close(answers_of([found], 3)[0], torch.matmul(*expected.truncated(3)), 1e-10)


@pytest.mark.parametrize("right", ["full", "singular"])
@pytest.mark.parametrize("metric", ["as it is", "zero"])
def test_a_member_of_zeros_changes_nothing_for_the_others(metric, right):
    problems = group(GROUPED, "full", right)
    zero = torch.zeros(5, WIDTH, dtype=torch.float64)
    left = Metric(full=gram(5, 9)) if metric == "as it is" else Metric(full=torch.zeros(5, 5, dtype=torch.float64))
    expected, solved = (
        factorize_jointly(given) for given in (problems, [*problems, Problem(zero, left, problems[0].right)])
    )
    tolerance = 1e-6 if solved[0].notes else 1e-9
    assert bool(solved[0].notes) <= (metric == "zero" and right == "singular")
    close(solved[0].squared, expected[0].squared, tolerance)
    for rank in (1, 4):
        *answers, last = answers_of(solved, rank)
        assert float(last.abs().max()) <= 1e-9
        assert error_of(problems, answers) == pytest.approx(float(expected[0].curve[rank]), rel=1e-5)


def test_a_rank_may_be_above_the_outputs_of_a_member():
    problems = group(WIDE)
    solved = factorize_jointly(problems)
    assert [found.truncated(6)[0].shape for found in solved] == [(3, 6), (4, 6)]
    kept = [found.kept(6) for found in solved]
    assert [part.left.shape for part in kept] == [(3, 6), (4, 6)]
    assert kept[0].right.untyped_storage().nbytes() == kept[0].right.numel() * 8
    assert torch.equal(kept[0].curve, solved[0].curve)


def test_what_no_member_shows_is_completed_by_one_decomposition(monkeypatch):
    problems = group(TALL, "none", "singular")
    solved = factorize_jointly(problems)
    calls = []
    monkeypatch.setattr("eckart.linalg.solve.checked_svd", lambda *args: calls.append(args) or checked_svd(*args))
    for answer, problem in zip(answers_of(solved, WIDTH), problems, strict=True):
        close(answer, problem.target, 1e-9)
    assert len(calls) == 1


def test_single_precision_and_centered_inputs():
    """Statistics as they come: float32, a mean taken off, blocks of outputs of two kinds."""
    found = layer(18, WIDTH)
    x = found.inputs.reshape(-1, WIDTH)
    right = Metric(full=x.mT @ x, scale=1 / len(x), mean=x.mean(0)).shrunk(0.1)
    lefts = [problem.left for problem in group((12, 6))]
    exact = [Problem(part, left, right) for part, left in zip(found.weight.split([12, 6]), lefts, strict=True)]
    single = [Problem(p.target.float(), p.left, p.right) for p in exact]
    tails = explicit_tails(exact)
    solved = factorize_jointly(single)
    assert solved[0].left.dtype == torch.float32
    for rank in (2, 5):
        answers = [answer.double() for answer in answers_of(solved, rank)]
        assert error_of(exact, answers) == pytest.approx(float(tails[rank]), rel=1e-5)


# -- errors in another metric --------------------------------------------------------------------------


@pytest.mark.parametrize("heights", HEIGHTS.values(), ids=HEIGHTS)
@pytest.mark.parametrize("solved_in", ["none", "singular", "full"])
def test_curve_under_another_metric_is_the_measured_error(solved_in, heights):
    measured = group(heights, "full", "full", seed=3)
    problems = [Problem(p.target, Metric(), KINDS[solved_in](WIDTH, 90)) for p in measured]
    solved = factorize_jointly(problems)
    curve = group_curve_under(solved, measured)
    direct = [error_of(measured, answers_of(solved, rank)) for rank in range(len(curve))]
    close(curve, torch.tensor(direct, dtype=torch.float64), 1e-9)
    whole = Factorization((torch.cat([s.left for s in solved]), solved[0].right), solved[0].squared)
    close(curve_under(whole, stack_problems(measured)), curve, 1e-12)
    own = group_curve_under(factorize_jointly(measured), measured)
    close(own, factorize_jointly(measured)[0].curve, 1e-9)


# -- refusals ------------------------------------------------------------------------------------------


def test_groups_that_cannot_be_are_refused():
    one, other = group((4, 3))
    with pytest.raises(UsageError, match=r"attn: a group of no weights"):
        factorize_jointly([], "attn")
    narrow = Problem(other.target[:, :4], other.left, Metric())
    given = one.right
    for wrong in (
        narrow,
        Problem(other.target, other.left, Metric()),
        Problem(other.target, other.left, one.right.shrunk(0.5)),
        Problem(other.target, other.left, Metric(full=given.full + 1, scale=given.scale, ridge=given.ridge)),
    ):
        with pytest.raises(UsageError, match=r"attn: weights 1 and 2 cannot share .*center all or none"):
            factorize_jointly([one, wrong], "attn")
    again = Metric(full=given.full.clone(), scale=given.scale, ridge=given.ridge)
    factorize_jointly([one, Problem(other.target, other.left, again)], "attn")
    broken = Problem(torch.full((3, WIDTH), float("nan"), dtype=torch.float64), other.left, one.right)
    with pytest.raises(NumericalError, match="attn: 30 of"):
        factorize_jointly([one, broken], "attn")
