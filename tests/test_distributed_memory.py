"""Free memory, the memory of this process, and the line that reports an estimate."""

import mmap
import sys
import time

import pytest
import torch

from eckart.distributed import memory
from eckart.distributed.memory import MemoryWatch, PeakMemory, format_bytes, free_memory, rss

MIB = 2**20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# -- memory of this process -----------------------------------------------------------------------------------


def filled(mib: int) -> mmap.mmap:
    """Memory of the system, not of the allocator, which may have as much left over from an earlier test."""
    held = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    torch.frombuffer(held, dtype=torch.uint8).fill_(1)
    return held


def test_rss_grows_by_what_is_allocated():
    before = rss()
    held = filled(64)
    assert 60 * MIB < rss() - before < 80 * MIB
    held.close()


@on_linux
def test_mapped_files_do_not_count_in_rss(tmp_path):
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
        held = filled(128)
        time.sleep(0.2)
        held.close()
    assert watch.peak - watch.before > 120 * MIB
    assert watch.peak > rss()


def test_watch_ends_after_an_error():
    watch = MemoryWatch()
    with pytest.raises(KeyError), watch:
        raise KeyError
    assert watch.peak >= watch.before > 0
    assert not watch._thread.is_alive()


# -- free memory -----------------------------------------------------------------------------------


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


def test_free_memory_is_what_the_system_calls_available(machine):
    assert free_memory() == free_memory("cpu") == free_memory(torch.device("cpu")) == free_memory("mps") == AVAILABLE
    assert free_memory("meta") is None


def group(machine, folder: str, limit: str, used: int, cache: int = 0) -> None:
    machine(f"{folder}/memory.max", f"{limit}\n")
    machine(f"{folder}/memory.current", f"{used}\n")
    machine(f"{folder}/memory.stat", f"anon 7\ninactive_file {cache}\nactive_file 9\n")


@pytest.mark.parametrize("path", ["/", "/slice/job", "/not/visible/in/here"])
def test_control_groups_limit_free_memory(path, machine):
    machine("proc/self/cgroup", f"0::{path}\n")
    group(machine, "cgroup", "2000", 700, 100)
    assert free_memory() == 1400
    group(machine, "cgroup/slice", "1500", 500)
    group(machine, "cgroup/slice/job", "max", 400)
    assert free_memory() == (1000 if path == "/slice/job" else 1400)
    group(machine, "cgroup", "2000", 2100)
    assert free_memory() == 0


def test_control_groups_of_version_1_limit_free_memory(machine):
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


def test_this_machine_has_free_memory():
    assert free_memory() is None or free_memory() > MIB


def test_free_memory_of_a_gpu_includes_the_unused_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_memory("cuda:0") == 1300


# -- estimates ---------------------------------------------------------------------------------------


def test_estimate_is_one_line():
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
def test_bytes_have_a_decimal_unit(number, words):
    assert format_bytes(number) == words
