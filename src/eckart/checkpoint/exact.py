"""Load a checkpoint to write it again as it is: every tensor in the type that it is stored in."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedModel

from eckart.checkpoint.load import load
from eckart.checkpoint.stored import stored_dtype, stored_tensors

TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Floating-point types as safetensors calls them."""


def load_exactly(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a model with all its bits: ``from_pretrained`` gives all tensors one type, and rounds those of a wider one.

    Args:
        folder: of the model.
        trust_remote_code: allow the model's own Python code to run.

    Returns:
        The model in eval mode, its tensors of the types that they are stored in.
    """
    stored = {name: TYPES[entry.dtype] for name, entry in stored_tensors(folder).items() if entry.dtype in TYPES}
    widest = torch.float64 if torch.float64 in stored.values() else torch.float32
    usual = stored_dtype(stored_tensors(folder)) or torch.float32
    model = load(folder, dtype=widest, trust_remote_code=trust_remote_code)
    prefix = f"{model.base_model_prefix}."
    kept = set(model.state_dict())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in kept and tensor.is_floating_point():
            names = (name, name.removeprefix(prefix), prefix + name)
            dtype = next((stored[other] for other in names if other in stored), usual)
            tensor.data = tensor.data.to(dtype)
    return model
