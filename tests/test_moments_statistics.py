"""Statistics: sums that do not depend on how text is cut into batches, of real tokens, at the width that is meant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import close, few_examples, normal, unchanged
from torch import Tensor

from eckart.errors import UsageError
from eckart.moments import Moments, SequenceStatistic, Statistic, deserialize, needs_backward, serialize
from eckart.moments import fisher as fisher_file
from eckart.moments.fisher import Fisher
from eckart.moments.gram import Gram
from eckart.moments.mean import Mean
from eckart.moments.outer_products import BLOCK, GPU_WIDER, _parts, add_gram, fill_lower
from eckart.registry import STATISTICS

every_statistic = pytest.mark.parametrize("name", STATISTICS)
M, N = 3, 4


def sequences(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (B, T, n) and gradients (B, T, m)."""
    return normal(count, 5, N, seed=seed).float(), normal(count, 5, M, seed=seed + 1).float()


def add(statistic: Statistic, inputs: Tensor, gradients: Tensor) -> None:
    """Update any kind of statistic with what it reads."""
    if isinstance(statistic, SequenceStatistic):
        statistic.update(inputs, gradients)
    else:
        rows = gradients if statistic.needs_backward else inputs
        statistic.update(rows.reshape(-1, rows.shape[-1]))


def seen(name: str, *parts: tuple[Tensor, Tensor]) -> Statistic:
    statistic = STATISTICS[name]()
    for part in parts:
        add(statistic, *part)
    return statistic


def agree(first: Statistic, second: Statistic, tolerance: float = 1e-6) -> None:
    """Counts exactly; sums up to rounding."""
    state, other = first.state(), second.state()
    assert state.keys() == other.keys()
    for key, value in state.items():
        if value.dim() == 0:
            assert int(value) == int(other[key]), key
        else:
            close(other[key], value, tolerance)


# -- what holds for every statistic ------------------------------------------------------------------


@every_statistic
def test_batches_and_processes_do_not_change_a_sum(name):
    x, g = sequences(6)
    whole = seen(name, (x, g))
    parts = [(x[i : i + 1], g[i : i + 1]) for i in range(6)]
    agree(seen(name, *parts), whole)
    merged = seen(name, *parts[:2])
    merged.merge(seen(name, *parts[2:]))
    agree(merged, whole)
    assert not whole.is_zero


@every_statistic
def test_merge_into_an_empty_statistic_copies(name):
    full, empty = seen(name, sequences(2)), STATISTICS[name]()
    assert empty.is_zero
    with unchanged(*full.state().values()):
        empty.merge(full)
        agree(empty, full)
        add(empty, *sequences(2, seed=7))
    agree(empty, seen(name, sequences(2), sequences(2, seed=7)))
    before = seen(name, sequences(2))
    full.merge(STATISTICS[name]())
    agree(full, before)


@every_statistic
def test_state_and_back(name):
    for statistic in (seen(name, sequences(3)), STATISTICS[name]()):
        state = statistic.state()
        assert all(v.dtype == torch.int64 and v.device.type == "cpu" for v in state.values() if v.dim() == 0)
        again = type(statistic).from_state(state)
        assert all(again.state()[key].data_ptr() == value.data_ptr() for key, value in state.items() if value.dim())
        agree(again, statistic)
        add(again, *sequences(1))
        assert not again.is_zero


@every_statistic
def test_size_is_that_of_the_sums(name):
    kept = sum(value.nbytes for value in seen(name, sequences(2)).state().values() if value.dim())
    assert STATISTICS[name].nbytes(M, N) == kept


def test_needs_are_statistics():
    assert needs_backward({"gram", "fisher"})
    assert not needs_backward({"gram", "absolute"})
    with pytest.raises(UsageError, match=r"statistic 'fischer' is not known. Did you mean 'fisher'"):
        needs_backward({"fischer"})
    with pytest.raises(KeyError, match=r"'fisher' was not gathered\. Name it in the method's `needs`"):
        Moments.empty({"gram"})["fisher"]


# -- Gram matrices -----------------------------------------------------------------------------------


def gram_of(*parts: Tensor) -> Gram:
    gram = Gram()
    for rows in parts:
        gram.update(rows)
    return gram


@pytest.mark.parametrize("width", [1, 7, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 5, 3 * BLOCK, 1024, 1100])
def test_gram_by_blocks_is_the_gram(width):
    first, second = normal(5, width), normal(3, width, seed=1)
    total = torch.zeros(width, width, dtype=torch.float64)
    with unchanged(first, second):
        add_gram(total, first)
        add_gram(total, second)
    rows = torch.cat([first, second])
    fill_lower(total)
    close(total, rows.mT @ rows, 1e-13)


def test_gram_below_the_block_diagonal_is_not_computed():
    total = torch.zeros(2 * BLOCK, 2 * BLOCK)
    add_gram(total, torch.ones(2, 2 * BLOCK))
    assert not total[BLOCK:, :BLOCK].any()


def test_gram_of_larger_blocks_is_filled_in():
    """As they come from a GPU."""
    rows = normal(5, 2 * GPU_WIDER + 3)
    parts = _parts(rows.shape[1], "cuda")
    assert [part.stop - part.start for part in parts] == [GPU_WIDER, GPU_WIDER, 3]
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in parts:
        total[part, part.start :] = rows[:, part].mT @ rows[:, part.start :]
    fill_lower(total)
    close(total, rows.mT @ rows, 1e-13)


@few_examples
@given(tokens=st.integers(2, 40), width=st.integers(1, 12), seed=st.integers(0, 99))
def test_means_are_those_of_all_tokens(tokens, width, seed):
    rows = normal(tokens, width, seed=seed).float()
    moments = Moments.empty({"gram", "absolute"})
    for part in rows.chunk(3):
        for statistic in moments.shared.values():
            statistic.update(part)
    rows = rows.double()
    close(moments.input_gram, rows.mT @ rows / tokens, 1e-6)
    # A mean may cancel to almost nothing: its rounding is relative to the summed magnitudes.
    assert float((moments.mean - rows.mean(0)).abs().max()) <= 1e-6 * float(rows.abs().mean(0).max())
    close(moments["absolute"].mean, rows.abs().mean(0), 1e-6)
    assert moments.tokens == tokens


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("width", [6, 2 * BLOCK + 1])
def test_metric_reads_the_sum_in_place(width, centered):
    """Also after more was added to a sum that had been made symmetric."""
    rows = normal(9, width).float()
    moments = Moments.empty({"gram"})
    moments.centered = centered
    for part in rows.chunk(2):
        for statistic in moments.shared.values():
            statistic.update(part)
        metric = moments.input_metric
        assert metric.full is moments["gram"].gram
        close(metric.full, metric.full.mT, 1e-6)
    expected = torch.cov(rows.double().mT, correction=0) if centered else rows.double().mT @ rows.double() / 9
    close(moments.input_gram, expected.float(), 1e-5)
    probe = normal(width, 3).float()
    close(moments.input_metric.times(probe), expected.float() @ probe, 1e-5)


def test_inputs_that_never_vary_have_no_covariance():
    """Not one of rounding, which would count as a direction."""
    rows = normal(1, 7).float().expand(5, 7)
    moments = Moments.empty({"gram"})
    moments.centered = True
    for statistic in moments.shared.values():
        statistic.update(rows)
    assert not moments.input_gram.any()
    assert moments.input_metric.shrunk(0.5).mean_diagonal == 0


@pytest.mark.parametrize("width", [6, 2 * BLOCK + 1])
def test_a_gram_that_was_read_can_be_added_to(width):
    first, second = normal(5, width).float(), normal(4, width, seed=1).float()
    gram, other = gram_of(first), gram_of(second)
    assert bool(gram.mean.any())
    gram.merge(other)
    close(gram.mean, gram_of(first, second).mean, 1e-6)
    gram.update(second)
    close(gram.mean, gram_of(first, second, second).mean, 1e-6)
    assert gram.count == 13
    close(gram.gram.triu(1), gram.gram.tril(-1).mT, 1e-6)


def test_saved_sums_are_read_and_never_written():
    state = gram_of(normal(5, 2 * BLOCK + 1).float()).state()
    with unchanged(*state.values()):
        assert bool(Gram.from_state(state).metric.matrix.any())


def test_half_precision_inputs_do_not_overflow():
    rows = torch.full((64, 3), 3e4, dtype=torch.float16)
    gram = gram_of(rows)
    assert gram.gram.dtype == torch.float64
    close(gram.mean, torch.full((3, 3), float(rows[0, 0]) ** 2, dtype=torch.float64), 1e-6)


def test_the_order_of_batches_does_not_show_in_a_gram(monkeypatch):
    parts = [normal(40, 48, seed=i).float() for i in range(24)]
    orders = (parts, parts[::2] + parts[1::2])
    one, other = (gram_of(*order).mean for order in orders)
    assert one.dtype == torch.float64
    close(one, other, 1e-14)
    monkeypatch.setattr("eckart.moments.outer_products.WIDE", 40)
    wide, moved = (gram_of(*order).mean for order in orders)
    assert wide.dtype == torch.float32
    assert not torch.equal(wide, moved)
    close(wide, moved, 1e-5)


# -- the Fisher matrix -------------------------------------------------------------------------------


def per_sequence(inputs: Tensor, gradients: Tensor) -> Tensor:
    """(m, n): the squared gradient of W of each sequence, summed."""
    return sum((g.mT @ x).square() for x, g in zip(inputs, gradients, strict=True))


@pytest.mark.parametrize("entries", [1, 7, 13, 2**24])
def test_fisher_sums_squares_of_sequences_not_of_tokens_or_batches(entries, monkeypatch):
    """In whatever blocks it is computed."""
    monkeypatch.setattr(fisher_file, "FISHER_ENTRIES", entries)
    inputs, gradients = sequences(6)
    fisher = Fisher()
    fisher.update(inputs[:4], gradients[:4])
    fisher.update(inputs[4:], gradients[4:])
    squared = per_sequence(inputs.double(), gradients.double())
    assert fisher.sequences == 6
    close(fisher.rows, squared.sum(1), 1e-6)
    close(fisher.columns, squared.sum(0), 1e-6)


# -- sites as tensors --------------------------------------------------------------------------------


def one_site(seed: int, shared: dict[str, Statistic] | None = None) -> Moments:
    moments = Moments.empty(STATISTICS, shared)
    for statistic in (moments.statistics if shared is None else moments.own).values():
        add(statistic, *sequences(2, seed))
    moments.sequences = 2
    return moments


def group(seed: int) -> dict[str, Moments]:
    """Two sites that share an input."""
    gate = one_site(seed)
    return {"gate": gate, "up": one_site(seed + 1, gate.shared)}


def test_moments_state_and_back():
    for moments in (one_site(0), Moments.empty({"gram"}), Moments(centered=True, sequences=3)):
        state = moments.state()
        again = Moments.from_state(state)
        assert again.statistics.keys() == moments.statistics.keys()
        assert (again.sequences, again.centered) == (moments.sequences, moments.centered)
        assert again.state().keys() == state.keys()
        assert all(torch.equal(again.state()[key], value) for key, value in state.items())


def test_serialized_groups_share_their_inputs_again():
    sites = group(0)
    state = serialize(sites)
    assert "gate:gram.gram" in state
    assert "up:gram.gram" not in state
    pointers = [tensor.data_ptr() for tensor in state.values() if tensor.dim()]
    assert len(set(pointers)) == len(pointers)
    again = deserialize(state, {"gate": ("gate", "up"), "down": ("down",)})
    assert set(again) == {"gate", "up"}
    assert again["gate"]["gram"] is again["up"]["gram"]
    assert again["gate"]["fisher"] is not again["up"]["fisher"]
    assert serialize(again).keys() == state.keys()


def test_serialized_sites_of_processes_add_up():
    """In place, as a reduction over processes does it; one of them has not reached a site."""
    first, second = serialize(group(0)), serialize({"gate": group(5)["gate"]})
    for key, tensor in second.items():
        first[key] += tensor
    found, expected = deserialize(first, {"gate": ("gate", "up")}), group(0)
    for statistic, other in zip(
        expected["gate"].statistics.values(), group(5)["gate"].statistics.values(), strict=True
    ):
        statistic.merge(other)
    for name in ("gate", "up"):
        for kind, statistic in expected[name].statistics.items():
            agree(found[name][kind], statistic, 1e-12)
    assert (found["gate"].sequences, found["up"].sequences) == (4, 2)
    assert isinstance(found["up"]["mean"], Mean)
    assert found["up"].tokens == 20


@every_statistic
def test_the_source_says_whether_a_backward_pass_is_needed(name):
    """Tables of methods read it there, without torch."""
    assert STATISTICS.about(name)["needs_backward"] == STATISTICS[name].needs_backward
