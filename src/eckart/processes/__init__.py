"""One run over several processes: who takes what, and how sums, results and errors get from one to another."""

from eckart.processes.group import ElsewhereError, Processes
from eckart.processes.start import is_main, quiet_others, start

__all__ = ["ElsewhereError", "Processes", "is_main", "quiet_others", "start"]
