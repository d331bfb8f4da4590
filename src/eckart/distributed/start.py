"""Find out which process this is, and connect it to the others."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from eckart.distributed.group import Processes
from eckart.distributed.launcher import read_launcher
from eckart.errors import UsageError

# One process may solve a large site for hours while the others wait for its result.
TIMEOUT = timedelta(days=14)


def start_processes(device: str | None = None, *, rendezvous: str = "env://") -> Processes:
    """Connect to the other processes, if a launcher such as torchrun has started several.

    A second call returns the same processes. The connection is closed when this process ends.

    Args:
        device: as `--device` takes it; with "cuda" each process gets a GPU of its own.
        rendezvous: address at which the processes find each other, as `torch.distributed.init_process_group` takes it.

    Returns:
        The processes; a single one without a launcher.

    Raises:
        UsageError: if the launcher's variables contradict each other, or there is no such device for every process.
    """
    rank, size, local = read_launcher()
    own = torch.device(device or "cpu") if size == 1 else _device_of_process(device or "cpu", local)
    if size > 1 and not dist.is_available():
        raise UsageError(f"WORLD_SIZE={size}: this build of torch has no torch.distributed; run one process.")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
        atexit.register(_disconnect)
    return Processes(rank, size, own)


def silence_other_processes(processes: Processes) -> None:
    """Show progress bars and warnings in the main process only; the others log errors only."""
    if processes.main:
        return
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    else:  # read when it is imported, which takes seconds
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    disable_progress_bars()  # eckart's own bars obey it too
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    for name in ("eckart", "datasets", "huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _device_of_process(asked: str, local: int) -> torch.device:
    device = torch.device(asked)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"--device {asked}: several processes run on cpu or cuda; use one of these, or one process.")
    if device.index is not None:
        raise UsageError(f"--device {asked}: each process takes a GPU of its own; use --device cuda.")
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"--device cuda: process {local} of this machine finds no GPU of its own among "
            f"{torch.cuda.device_count()}; start no more processes than there are, or use --device cpu."
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
