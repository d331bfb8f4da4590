"""Plain training of every weight on the task's own loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eckart.recovery.base import Recovery


@dataclass
class Full(Recovery):
    """All weights, factors as well as dense ones, on the task's loss."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "every weight on the task's own loss"
    use: ClassVar[str] = "There are labels or text of the task, and no original to learn from."
