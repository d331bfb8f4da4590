"""Find out which process this is, and get in touch with the others."""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from eckart.distributed.group import Processes
from eckart.errors import UsageError

# The owner of a large site may solve for hours while the others wait for what it finds.
PATIENCE = timedelta(days=14)


def start_processes(device: str | None = None, *, rendezvous: str = "env://") -> Processes:
    """Get in touch with the other processes, where the launcher says that there are some.

    Called again, it gives the same processes. Contact ends with this process.

    Args:
        device: as `--device` takes it; "cuda" is each process's own GPU.
        rendezvous: where the processes find each other, as `torch.distributed.init_process_group` takes it.

    Returns:
        The processes; one alone where no launcher started several.

    Raises:
        UsageError: if the launcher's variables make no sense, or there is no such device for every process.
    """
    rank, size, local = _place()
    own = torch.device(device or "cpu") if size == 1 else _own_device(device or "cpu", local)
    if size > 1 and not dist.is_available():
        raise UsageError(f"WORLD_SIZE={size}: this build of torch has no torch.distributed; run one process.")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
        atexit.register(_leave)
    return Processes(rank, size, own)


def is_main() -> bool:
    """Whether this process is the one that prints; also before :func:`start`, and where that will refuse."""
    try:
        return _place()[0] == 0
    except UsageError:
        return True


def silence_other_processes(processes: Processes) -> None:
    """Let one process alone show bars and log; of the others only errors are heard."""
    if processes.main:
        return
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    datasets.disable_progress_bars()
    disable_progress_bars()  # our own bars obey it too
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    for name in ("eckart", "datasets", "huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _place() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine."""
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


def _own_device(asked: str, local: int) -> torch.device:
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


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
