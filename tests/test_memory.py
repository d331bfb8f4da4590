"""What memory there is, what is taken, and estimates that hold."""

import gc
import mmap
import sys
import time

import pytest
import torch
from problems import normal

from eckart.distributed import memory
from eckart.distributed.memory import MemoryWatch, PeakMemory, format_bytes, free_memory, rss
from eckart.linalg import Metric, Problem, factorize
from eckart.moments import Moments
from eckart.moments.memory import solving_bytes, statistics_bytes

MIB = 2**20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# -- what is taken -----------------------------------------------------------------------------------


def test_rss_grows_with_what_is_held():
    before = rss()
    held = torch.ones(16 * MIB)
    assert 60 * MIB < rss() - before < 80 * MIB
    del held


@on_linux
def test_mapped_files_are_not_counted(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"x" * (64 * MIB))
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = rss()
        assert sum(mapped[::4096]) == 16 * 1024 * ord("x")
        assert rss() - before < 8 * MIB


def test_rss_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROC", tmp_path)
    assert rss() > 10 * MIB
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert rss() > 10 * MIB


def test_watch_keeps_the_peak():
    with MemoryWatch(0.005) as watch:
        held = torch.ones(32 * MIB)
        time.sleep(0.2)
        del held
    assert watch.peak - watch.before > 120 * MIB
    assert watch.peak > rss()


def test_watch_ends_with_an_error():
    watch = MemoryWatch()
    with pytest.raises(KeyError), watch:
        raise KeyError
    assert watch.peak >= watch.before > 0
    assert not watch._thread.is_alive()


# -- what there is -----------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 GB available, whose files tests write."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    put(
        "proc/meminfo",
        "MemTotal:       16000000 kB\nMemFree:        1000 kB\nMemAvailable:   8000000 kB\nHugePages: 0\n",
    )
    return put


AVAILABLE = 8_000_000 * 1024


def test_what_the_system_would_give_away(machine):
    assert free_memory() == free_memory("cpu") == free_memory(torch.device("cpu")) == free_memory("mps") == AVAILABLE
    assert free_memory("meta") is None


def group(machine, folder: str, limit: str, used: int, cache: int = 0) -> None:
    machine(f"{folder}/memory.max", f"{limit}\n")
    machine(f"{folder}/memory.current", f"{used}\n")
    machine(f"{folder}/memory.stat", f"anon 7\ninactive_file {cache}\nactive_file 9\n")


@pytest.mark.parametrize("path", ["/", "/slice/job", "/not/visible/in/here"])
def test_limits_of_control_groups(path, machine):
    machine("proc/self/cgroup", f"0::{path}\n")
    group(machine, "cgroup", "2000", 700, 100)
    assert free_memory() == 1400
    group(machine, "cgroup/slice", "1500", 500)
    group(machine, "cgroup/slice/job", "max", 400)
    assert free_memory() == (1000 if path == "/slice/job" else 1400)
    group(machine, "cgroup", "2000", 2100)
    assert free_memory() == 0


def test_limits_of_the_first_version(machine):
    machine("proc/self/cgroup", "9:name=systemd:/\n4:memory:/docker/abc\n1:cpu,cpuacct:/\n0::/\n")
    machine("cgroup/memory/memory.limit_in_bytes", "5000\n")
    machine("cgroup/memory/memory.usage_in_bytes", "3000\n")
    machine("cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 250\n")
    assert free_memory() == 2250
    machine("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")  # none
    assert free_memory() == AVAILABLE


def test_free_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROC", tmp_path)
    assert free_memory() is None or free_memory() > MIB
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert free_memory() is None or free_memory() > MIB


def test_this_machine_has_some():
    assert free_memory() is None or free_memory() > MIB


def test_a_gpu_counts_what_the_cache_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_memory("cuda:0") == 1300


# -- estimates ---------------------------------------------------------------------------------------


def test_an_estimate_is_one_line():
    parts = {"block": 8e8, "statistics": 2e9, "solving": 6e8, "text": 3e8, "outside": 2e8}
    whole = PeakMemory(**{name: int(value) for name, value in parts.items()}, free=int(14.2e9))
    assert whole.total == 3_900_000_000
    assert str(whole) == (
        "about 3.9 GB at the peak (block 0.8, statistics 2.0, solving 0.6, text 0.3, outside 0.2), 14.2 GB free"
    )
    assert whole.fits
    assert not PeakMemory(block=2, free=1).fits
    assert PeakMemory(block=2).fits
    assert str(PeakMemory(block=3_000_000, text=1_500_000)) == "about 4.5 MB at the peak (block 3.0, text 1.5)"
    assert str(PeakMemory()) == "about 0 B at the peak"


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (8.04e8, "804.0 MB"), (2.5e12, "2500.0 GB")]
)
def test_human(number, words):
    assert format_bytes(number) == words


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


@pytest.mark.parametrize(("m", "n"), [(1024, 512), (512, 1024), (768, 768)])
@pytest.mark.parametrize("two_sided", [False, True])
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
    assert 0 < watch.peak - watch.before <= solving_bytes(m, n, needs)
