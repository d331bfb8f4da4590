"""A published folder, read back as anyone would, and held against what was in memory when it was written."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.adaptive import adaptive_spec, in_words
from eckart.checkpoint.description import described, is_ours
from eckart.checkpoint.mapped import load_mapped
from eckart.errors import CheckpointError, EckartError
from eckart.storage.layout import model_folder, read_json
from eckart.storage.manifest import find_changes

logger = logging.getLogger(__name__)

RECORD = "eckart/tensors.json"
FORMAT = "eckart tensors"
SHOWN = 8  # problems of one kind in a message
PIECE = 1 << 24  # numbers that are read at once

PROGRAM = "import sys, json; from eckart.checkpoint.read_back import read_back; \
print(json.dumps(read_back(sys.argv[1], trust_remote_code=sys.argv[2] == 'True').as_dict()))"


@dataclass
class ReadBack:
    """What was found in a folder.

    Attributes:
        model: the class that was loaded; "" for a folder that holds none of transformers.
        numbers: how many numbers it has.
        compared: how many of its tensors were compared with those that were written.
        files: how many files were compared with the list of what was published.
        behaviors: what lets the model do less for easy inputs, in words.
        problems: what is wrong, each with the place; empty for a folder that is whole.
        notes: what could not be looked at.
    """

    model: str = ""
    numbers: int = 0
    compared: int = 0
    files: int = 0
    behaviors: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self))


def write_record(folder: Path, model: PreTrainedModel) -> None:
    """Write what the tensors of a model are, in memory, beside the files that are made of them."""
    tensors = {
        name: [str(tensor.dtype).removeprefix("torch."), f"{checksum(tensor):08x}"]
        for name, tensor in _plain(model).items()
        if not tensor.is_meta
    }
    (folder / RECORD).parent.mkdir(exist_ok=True)
    content = {"format": FORMAT, "class": type(model).__name__, "tensors": tensors}
    (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's numbers, in order."""
    flat = tensor.detach().reshape(-1)
    found = 0
    for start in range(0, flat.numel(), PIECE):
        raw = flat[start : start + PIECE].cpu().contiguous().view(torch.uint8)
        found = zlib.crc32(raw.numpy().data, found)
    return found


def read_back(folder: str | Path, *, trust_remote_code: bool = False) -> ReadBack:
    """Load a folder and compare every tensor with what was in memory when it was written.

    Args:
        folder: one that eckart publishes or has published.
        trust_remote_code: allow the model's own Python code to run.
    """
    folder = Path(folder)
    found = ReadBack()
    config = model_folder(folder) / "config.json"
    if not config.is_file():
        found.notes.append("it holds no model of transformers: its files alone were compared")
        return found
    quantization = read_json(config).get("quantization_config") or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method is not None and not is_ours(method):
        found.notes.append(f"it is quantized ({method}): its files alone were compared")
        return found
    try:
        with tempfile.TemporaryDirectory(prefix="eckart-verify-", ignore_cleanup_errors=True) as scratch:
            model = load_mapped(folder, scratch=Path(scratch), trust_remote_code=trust_remote_code)
            _compare(model, folder, found)
    except EckartError as error:
        found.problems.append(str(error))
    return found


def verify_folder(folder: str | Path, *, trust_remote_code: bool = False) -> ReadBack:
    """Everything that can be known of a published folder: its files by hash, its weights, its description.

    Raises:
        CheckpointError: it is no folder, or eckart has not published it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give one that eckart has published.")
    files, changes = find_changes(folder)
    found = read_back(folder, trust_remote_code=trust_remote_code)
    found.files = files
    found.problems = changes + found.problems
    return found


def read_back_in_fresh_process(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Let another process load a folder, as anyone will, and refuse what it finds different.

    Raises:
        CheckpointError: naming what differs, or what the process said when it failed.
    """
    found = run_fresh(folder, trust_remote_code)
    if found["problems"]:
        raise CheckpointError(
            f"What was written to {folder} is not what was in memory: {'; '.join(found['problems'][:SHOWN])}. Nothing "
            "was published. Check the memory and the disk of this machine, and report this with the output of "
            "`pip list`; --no-verify publishes without reading back."
        )
    logger.info("%s: %d tensors read back in a fresh process", folder, found["compared"])


def run_fresh(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """What :func:`read_back` finds in a process of its own."""
    source = str(Path(__file__).parents[2])
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder), str(trust_remote_code)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": paths},
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = " ".join(done.stderr.split())[-400:] or f"it ended with {done.returncode}"
        return {"problems": [f"it could not be read in a fresh process ({last})"], "compared": 0}
    return found


def _plain(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model that hold numbers; rounded weights are objects of their library, which checks them."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if type(tensor) is Tensor and tensor.numel()}


def _compare(model: PreTrainedModel, folder: Path, found: ReadBack) -> None:
    found.model = type(model).__name__
    state = _plain(model)
    found.behaviors = in_words(model)
    found.numbers = sum(parameter.numel() for parameter in model.parameters())
    path = folder / RECORD
    if not path.is_file():
        found.notes.append(f"there is no {RECORD}: the numbers were loaded and not compared")
    else:
        _compare_record(read_json(path), state, path, found)
    said = read_json(model_folder(folder) / "config.json").get("quantization_config") or {}
    if said.get("modules", {}) != json.loads(json.dumps(described(model))):
        found.problems.append("the modules that config.json describes are not those that were loaded")
    if said.get("adaptive") != json.loads(json.dumps(adaptive_spec(model))):
        found.problems.append("how config.json says that the model behaves is not how the loaded one does")


def _compare_record(record: dict[str, Any], state: dict[str, Tensor], path: Path, found: ReadBack) -> None:
    written = record.get("tensors")
    if record.get("format") != FORMAT or not isinstance(written, dict):
        found.problems.append(f"{path} is not a record of tensors")
        return
    if record.get("class") != found.model:
        found.problems.append(f"it was written as {record.get('class')} and loads as {found.model}")
    if lost := sorted(written.keys() - state.keys()):
        found.problems.append(f"{len(lost)} tensors are gone: {', '.join(lost[:SHOWN])}")
    if new := sorted(state.keys() - written.keys()):
        found.problems.append(f"{len(new)} tensors are new: {', '.join(new[:SHOWN])}")
    other = []
    for name in sorted(written.keys() & state.keys()):
        dtype, digest = written[name]
        if str(state[name].dtype) != f"torch.{dtype}":
            found.notes.append(f"{name} was written as {dtype} and is loaded as {state[name].dtype}")
            continue
        found.compared += 1
        if f"{checksum(state[name]):08x}" != digest:
            other.append(name)
    if other:
        found.problems.append(f"the numbers of {len(other)} tensors are others: {', '.join(other[:SHOWN])}")
