"""One run over several processes: division of work, sums, exchange of results and errors; memory of a process."""

from eckart.distributed.group import OtherProcessError, Processes
from eckart.distributed.start import is_main, silence_other_processes, start_processes

__all__ = ["OtherProcessError", "Processes", "is_main", "silence_other_processes", "start_processes"]
