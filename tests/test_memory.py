"""Estimates of memory that hold: of statistics and of the solver."""

import gc

import pytest
import torch
from problems import normal

from eckart.distributed.memory import MemoryWatch
from eckart.linalg import Metric, Problem, factorize, slice_neurons
from eckart.moments import Moments
from eckart.moments.memory import slicing_bytes, solving_bytes, statistics_bytes


@pytest.mark.parametrize(
    "needs",
    [set(), {"gram"}, {"absolute"}, {"gram", "gradients"}, {"fisher"}, {"gram", "absolute", "gradients", "fisher"}],
)
def test_statistics_are_counted_as_they_are_kept(needs):
    """Two sites that share an input of 5, and one of another."""
    sites, groups = [(3, 5), (4, 5), (7, 2)], [(0, 1), (2,)]
    kept = {}
    for members in groups:
        inputs = Moments.empty(needs).shared
        for statistic in inputs.values():
            statistic.update(normal(6, sites[members[0]][1]))
        for place in members:
            m, n = sites[place]
            entry = Moments.empty(needs, inputs)
            if "gradients" in needs:
                entry["gradients"].update(normal(6, m))
            if "fisher" in needs:
                entry["fisher"].update(normal(2, 3, n), normal(2, 3, m))
            kept |= {id(value): value for value in entry.state().values() if value.dim()}
    wanted = sum(tensor.nbytes for tensor in kept.values())
    assert statistics_bytes(sites, groups, frozenset(needs)) == wanted


@pytest.mark.parametrize(("m", "n", "two_sided"), [(1024, 512, True), (512, 1024, False), (768, 768, True)])
def test_solving_takes_no_more_than_estimated(m, n, two_sided):
    def problem(m: int, n: int) -> Problem:
        rows, columns = (normal(width // 2, width, seed=width).float() for width in (m, n))  # singular: the costly case
        left = Metric(full=rows.mT @ rows).shrunk(0.3) if two_sided else Metric()
        return Problem(normal(m, n).float(), left, Metric(full=columns.mT @ columns).shrunk(0.1 if two_sided else 0))

    assert factorize(problem(96, 64)).factors  # what libraries allocate once
    problem, needs = problem(m, n), frozenset({"gram", "gradients"} if two_sided else {"gram"})
    gc.collect()
    with MemoryWatch(0.002) as watch:
        factors = factorize(problem).factors
    assert factors[0].shape == (m, min(m, n))
    assert watch.peak - watch.before <= solving_bytes(m, n, needs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slicing_takes_no_more_than_estimated(dtype, monkeypatch):
    if dtype == torch.float32:
        for module in ("eckart.linalg.slice", "eckart.moments.memory"):
            monkeypatch.setattr(f"{module}.WIDE", 500)

    def problem(m: int, n: int) -> Problem:
        rows, columns = (normal(2 * width, width, seed=width).float() for width in (m, n))
        return Problem(normal(m, n).float(), Metric(full=rows.mT @ rows), Metric(full=columns.mT @ columns).shrunk(0.1))

    slice_neurons(problem(16, 24))
    given = problem(256, 768)
    takes, kept = slicing_bytes(256, 768)
    gc.collect()
    with MemoryWatch(0.002) as watch:
        found = slice_neurons(given).kept(767)
    assert found.lower.dtype == dtype
    assert watch.peak - watch.before <= takes
    numbers = found.mixed.numel() + 767 * 768 // 2
    assert numbers * dtype.itemsize <= kept < 2.5 * numbers * dtype.itemsize
