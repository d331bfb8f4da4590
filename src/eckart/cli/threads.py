"""Threads that wait asleep: on a busy machine, those that spin take the time of those that compute."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""What OpenMP's runtimes read when they are loaded, which is with torch: the standard's name, GNU's, LLVM's."""


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait sleep, unless the user has said how they wait; call it before torch is imported."""
    if not any(name in environment for name in PASSIVE):
        environment.update(PASSIVE)
