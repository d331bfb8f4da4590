"""A hash that ties a plan to the model it was made for."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLES = 4096


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
