"""What a launcher such as torchrun says of this process in the environment; torch is not imported."""

from __future__ import annotations

import os

from eckart.errors import UsageError


def is_main() -> bool:
    """Whether this process is the one that prints; may be asked before :func:`eckart.distributed.start_processes`."""
    try:
        return read_launcher()[0] == 0
    except UsageError:
        return True


def read_launcher() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, from the environment.

    Raises:
        UsageError: the launcher's variables contradict each other.
    """
    if os.environ.get("WORLD_SIZE", "1").strip() in ("", "1"):
        return 0, 1, 0
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    numbers = [int(word) if word.strip().isdecimal() else -1 for word in found.values()]
    rank, size, local = numbers
    # Some clusters set WORLD_SIZE for every job: without all three, waiting for others would have no end.
    if min(numbers) < 0 or rank >= size:
        given = ", ".join(f"{name}={word or '(not set)'}" for name, word in found.items())
        raise UsageError(f"{given}: start several processes with torchrun, or unset WORLD_SIZE to run one.")
    return rank, size, local
