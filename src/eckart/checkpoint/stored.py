"""What the files of a folder store, read from their headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from eckart.storage.layout import model_folder, read_json
from eckart.storage.shards import BITS, TensorEntry, read_weights

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float32}


def stored_dtype(tensors: Mapping[str, TensorEntry]) -> torch.dtype | None:
    """The type of most of the floating-point numbers; float64 counts as float32. None where there are none."""
    counts: Counter[torch.dtype] = Counter()
    for entry in tensors.values():
        if entry.dtype in FLOATS:
            counts[FLOATS[entry.dtype]] += math.prod(entry.shape)
    return counts.most_common(1)[0][0] if counts else None


def stored_size(tensors: Mapping[str, TensorEntry]) -> tuple[int, int]:
    """Numbers and bytes of the tensors, a tied weight once."""
    numbers = [(math.prod(entry.shape), BITS[entry.dtype]) for entry in tensors.values()]
    return sum(count for count, _ in numbers), sum(count * bits // 8 for count, bits in numbers)


def stored_tensors(folder: str | Path) -> dict[str, TensorEntry]:
    """The tensors of a model folder as its files' headers describe them; none for a folder without a config.

    Raises:
        CheckpointError: if files are missing or damaged.
    """
    home = model_folder(Path(folder))
    if not (home / "config.json").is_file():
        return {}
    return read_weights(home, read_json(home / "config.json").get("transformers_weights")).tensors
