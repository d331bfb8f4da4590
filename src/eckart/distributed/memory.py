"""Free memory, the memory of this process, and the estimate of what a run will need."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


def rss() -> int:
    """Bytes that this process holds in memory, without mapped files: the system can drop those.

    On other systems than Linux, the resident memory with mapped files; without psutil there, its peak so far.
    """
    status = _kilobytes(PROC / "self" / "status")
    if "RssAnon" in status:
        return status["RssAnon"] + status.get("RssShmem", 0)
    psutil = _psutil()
    return _peak_resident() if psutil is None else int(psutil.Process().memory_info().rss)


def free_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can still be allocated on a device, by all its processes together; None if unknown.

    Args:
        device: "cpu" is what the system calls available, within the limits of the process's control groups;
            "cuda" is what the driver has free and what torch's cache holds unused.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type not in ("cpu", "mps"):  # a Mac's GPU computes in the system's memory
        return None
    available = [found for found in (_available(), *_left_in_control_groups()) if found is not None]
    return max(0, min(available)) if available else None


class MemoryWatch:
    """Measure the peak memory of this process during a `with` block; an object serves one block.

    Attributes:
        peak: the largest :func:`rss` seen, in bytes.
        before: :func:`rss` on entering.
    """

    def __init__(self, seconds: float = 0.02) -> None:
        self.peak = self.before = 0
        self._seconds = seconds
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="memory", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self.peak = self.before = rss()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
        self.peak = max(self.peak, rss())

    def _follow(self) -> None:
        while not self._left.wait(self._seconds):
            self.peak = max(self.peak, rss())


@dataclass(frozen=True)
class PeakMemory:
    """Estimated peak memory of a run, in bytes, and the memory that is free.

    Attributes:
        block: weights of the block that is computed.
        statistics: sums over the calibration text.
        solving: working memory of the solver.
        text: the calibration text and its hidden states.
        outside: weights outside the blocks.
        program: this process before the run.
        free: free memory; None if unknown.
    """

    block: int = 0
    statistics: int = 0
    solving: int = 0
    text: int = 0
    outside: int = 0
    program: int = 0
    free: int | None = None

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.block + self.statistics + self.solving + self.text + self.outside + self.program

    @property
    def fits(self) -> bool:
        """Whether the free memory is enough; True if it is unknown."""
        return self.free is None or self.total - self.program <= self.free

    def __str__(self) -> str:
        _, size = _unit(self.total)
        names = ("block", "statistics", "solving", "text", "outside", "program")
        parts = ", ".join(f"{name} {getattr(self, name) / size:.1f}" for name in names if getattr(self, name))
        left = "" if self.free is None else f", {format_bytes(self.free)} free"
        return f"about {format_bytes(self.total)} at the peak{f' ({parts})' if parts else ''}{left}"


def format_bytes(number: float) -> str:
    """Bytes with a decimal unit: `3.9 GB`, of 10^9."""
    name, size = _unit(number)
    return f"{number / size:.1f} {name}" if size > 1 else f"{int(number)} {name}"


def _unit(number: float) -> tuple[str, float]:
    return next((name, size) for name, size in UNITS if number >= size or size == 1)


def _kilobytes(path: Path) -> dict[str, int]:
    """The `Name: number kB` lines of a file under /proc, in bytes; none where there is no such file."""
    lines = (line.split() for line in _text(path).splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _psutil() -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module("psutil")
    except ImportError:
        return None


def _peak_resident() -> int:
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _available() -> int | None:
    """Memory that the system calls available."""
    found = _kilobytes(PROC / "meminfo").get("MemAvailable")
    if found is not None:
        return found
    psutil = _psutil()
    if psutil is not None:
        return int(psutil.virtual_memory().available)
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_in_control_groups() -> Iterator[int]:
    """Bytes left under the limit of each control group that this process is in, and of their parents."""
    for line in _text(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, used, cache = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        place = PurePosixPath(path.lstrip("/"))
        # Inside a container some parts of the path may not exist: only those that do are read.
        for group in (root / place, *(root / parent for parent in place.parents)):
            most, now = _text(group / limit).strip(), _text(group / used).strip()
            if not most.isdecimal() or not now.isdecimal():  # "max", or nothing here
                continue
            lines = (words.split() for words in _text(group / "memory.stat").splitlines())
            # The system drops file pages that were not used lately when memory is needed.
            given_up = next((int(words[1]) for words in lines if words[:1] == [cache]), 0)
            yield int(most) - int(now) + given_up
