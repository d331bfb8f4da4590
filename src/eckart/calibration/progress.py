"""Progress over blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from eckart.data.inference import progress
from eckart.distributed.memory import format_bytes, rss


def show_steps(steps: Sequence[int], what: str) -> Iterator[int]:
    """A bar over blocks, with the memory that this process holds."""
    bar: Any = progress(steps, what=what, total=len(steps))
    for step in bar:
        if hasattr(bar, "set_postfix_str"):
            bar.set_postfix_str(f"{format_bytes(rss())} held", refresh=False)
        yield step
