"""One run over several processes: who takes what, and how sums, results and errors get from one to another."""

from eckart.distributed.group import ElsewhereError, Processes
from eckart.distributed.start import is_main, quiet_others, start

__all__ = ["ElsewhereError", "Processes", "is_main", "quiet_others", "start"]
