"""One run over several processes: who takes what, and how sums, results and errors get from one to another."""

from eckart.distributed.group import OtherProcessError, Processes
from eckart.distributed.start import is_main, silence_other_processes, start_processes

__all__ = ["OtherProcessError", "Processes", "is_main", "silence_other_processes", "start_processes"]
