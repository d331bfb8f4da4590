"""Hashes that tie a plan, or an unfinished run, to the model it was made for."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import torch
from torch import nn

from eckart.checkpoint.stored import stored_tensors
from eckart.storage.layout import model_folder

SAMPLES = 4096
SPOTS, SPOT = 256, 4096


def fingerprint(model: nn.Module) -> str:
    """Hash a model by its class, its parameters' names and shapes, and a sample of signs.

    Of each parameter the signs of up to 4096 evenly spaced elements are taken: rounding to another dtype
    keeps every sign, so the same checkpoint loaded in float32, bfloat16 or float16, on any device, has the
    same hash, while training flips some signs among small weights. It tells models apart; it proves nothing
    about who made them.

    Args:
        model: the model, with its weights loaded (those on the meta device count by name and shape only).

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    digest.update(f"{type(model).__name__} {getattr(config, 'model_type', '')}\n".encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        if parameter.numel() and not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            step = -(-flat.numel() // SAMPLES)
            digest.update(torch.signbit(flat[::step]).cpu().numpy().tobytes())
    return digest.hexdigest()


def files_fingerprint(folder: Path) -> str:
    """Hash a checkpoint without loading it: its config, the layout of its weight files, and spots all over them.

    Args:
        folder: the checkpoint.

    Returns:
        64 hexadecimal digits. A change between the spots is not seen: :func:`weights_checksum` sees it.
    """
    home = model_folder(folder)
    digest = hashlib.sha256((home / "config.json").read_bytes())
    tensors = stored_tensors(folder)
    for name, entry in sorted(tensors.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
    for path in sorted({entry.file for entry in tensors.values()}):
        size = path.stat().st_size
        with path.open("rb") as file:
            for spot in range(SPOTS):
                file.seek(spot * size // SPOTS)
                digest.update(file.read(SPOT))
    return digest.hexdigest()


def weights_checksum(model: nn.Module) -> int:
    """CRC-32 of all parameters in order of their names; reads every byte."""
    checksum = 0
    for _, parameter in sorted(model.named_parameters()):
        if parameter.numel() and not parameter.is_meta:
            raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            checksum = zlib.crc32(raw.numpy().data, checksum)
    return checksum
