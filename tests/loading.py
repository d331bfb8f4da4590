"""Loads published models and compares them with what was published, in this process or (as a program) a fresh one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import output
from safetensors.torch import load_file
from torch import Tensor

import eckart

Job = tuple[str, str, str | None, str]
"""The folder, the Auto class, the dtype to load in, the file of inputs; what is expected lies beside it."""


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def load_and_compare(key: str, job: Job) -> dict[str, Any]:
    """What from_pretrained reports, and whether weights and output are the saved ones bit for bit."""
    folder, auto, dtype, inputs = job
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True, **options)
    saved = load_file(Path(inputs).parent / f"{key}.saved")
    found = model.state_dict()
    different = [n for n in saved if n not in found or not same(found[n], saved[n])]
    given = load_file(inputs)
    for tensor in (*model.parameters(), *model.buffers(), *given.values()):
        # Mapped from a file they lie anywhere, and products of such matrices may differ in their last bits.
        tensor.data = tensor.data.clone()
    made = output(model, given)
    expected = load_file(Path(inputs).parent / f"{key}.expected")["output"]
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "different": sorted(different + [n for n in found if n not in saved]),
        "dtype": str(made.dtype),
        "expected_dtype": str(expected.dtype),
        "equal": torch.equal(made, expected),
        "forms": sum(isinstance(m, eckart.forms.FactoredLinear) for m in model.modules()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({key: load_and_compare(key, job) for key, job in jobs.items()}))
