"""One run over several processes: division of work, sums, exchange of results and errors; memory of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eckart.distributed.launcher import is_main
from eckart.errors import OtherProcessError
from eckart.lookup.lazy import lazy_attributes

if TYPE_CHECKING:
    from eckart.distributed.group import Processes
    from eckart.distributed.start import silence_other_processes, start_processes

__all__ = ["OtherProcessError", "Processes", "is_main", "silence_other_processes", "start_processes"]

__getattr__, __dir__ = lazy_attributes(
    __name__, {"group": ("Processes",), "start": ("silence_other_processes", "start_processes")}
)
