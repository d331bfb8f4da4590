"""Hold the written folder against the model: it is loaded in a fresh process in which eckart cannot be imported."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from eckart.errors import CheckpointError, ModelError

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest norm of the difference over the norm of the output: rounding, in another order, gives less."""

READER = """
import json, sys
sys.modules["eckart"] = None  # an import of it fails
import torch, transformers
from safetensors.torch import load_file, save_file

def tensor_of(made):
    return next(value for value in made.to_tuple() if isinstance(value, torch.Tensor) and value.is_floating_point())

for job in json.load(open(sys.argv[1])):
    inputs, found = load_file(job["inputs"]), {}
    for auto_class in job["classes"]:
        model, info = getattr(transformers, auto_class).from_pretrained(
            job["folder"], trust_remote_code=True, dtype="auto", output_loading_info=True, local_files_only=True
        )
        missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
        if missing and auto_class == job["classes"][0]:
            sys.exit(f"{auto_class}: not in the weights: {missing[:4]}")
        with torch.inference_mode():
            found[auto_class] = tensor_of(model.eval()(**inputs)).clone().contiguous()
        del model
    save_file(found, job["outputs"])
"""


def compare(model: PreTrainedModel, folder: Path, classes: list[str]) -> dict[str, Any]:
    """Compare the outputs of a written folder with those of the model.

    Args:
        model: what was written; in evaluation mode.
        folder: it.
        classes: names of the Auto classes that load it: the first one the model, a second one its base model.

    Returns:
        What was compared: class -> largest relative difference, and the tolerance.

    Raises:
        CheckpointError: the folder cannot be loaded, or computes something else.
    """
    inputs = probe_inputs(model)
    wanted = {classes[0]: _output(model, inputs)} | {name: _output(model.base_model, inputs) for name in classes[1:]}
    found = read_without_eckart(folder, classes, inputs)
    tolerance = TOLERANCE.get(model.dtype, 1e-4)
    differences = {}
    for name, expected in wanted.items():
        difference = _difference(found[name], expected)
        if not difference <= tolerance:  # NaN too
            raise CheckpointError(
                f"What was written is not the model: the outputs of {name} differ by {difference:.2g} of their norm "
                f"(allowed: {tolerance:g}); nothing was published. Export the dense model instead (--format dense), "
                "and please report this with the model's name and the output of `pip list`."
            )
        differences[name] = difference
    return {"compared": differences, "tolerance": tolerance}


def read_without_eckart(folder: Path, classes: list[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of a folder's model, by the class that loaded it, in a fresh process without eckart.

    Raises:
        CheckpointError: it cannot be loaded there.
    """
    with tempfile.TemporaryDirectory(prefix="eckart-export-") as scratch:
        place = Path(scratch)
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, place / "inputs.safetensors")
        job = {
            "folder": str(folder.resolve()), "classes": classes,
            "inputs": str(place / "inputs.safetensors"), "outputs": str(place / "outputs.safetensors"),
        }  # fmt: skip
        (place / "jobs.json").write_text(json.dumps([job]), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", READER, str(place / "jobs.json")],
            env={**os.environ, "HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=place,
        )  # fmt: skip
        if done.returncode:
            last = "\n".join(done.stdout.strip().splitlines()[-6:])
            raise CheckpointError(
                f"What was written cannot be loaded without eckart; nothing was published. Export the dense model "
                f"instead (--format dense), and please report this with the model's name:\n{last}"
            )
        return load_file(place / "outputs.safetensors")


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A small batch of what a model reads: of texts two rows, one of them padded.

    Raises:
        ModelError: it reads neither tokens nor images.
    """
    stream = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, height, width, generator=stream).to(model.dtype)}
    if model.main_input_name != "input_ids":
        raise ModelError(
            f"{type(model).__name__} reads {model.main_input_name}: an export of it cannot be tried before it is "
            "published. Export the dense model instead: --format dense"
        )
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 8))
    ids = torch.randint(vocabulary, (2, 10), generator=stream)
    mask = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.clone()}
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _output(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        made = model(**inputs).to_tuple()
    return next(value for value in made if isinstance(value, Tensor) and value.is_floating_point())


def _difference(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return math.inf
    found, wanted = found.float(), wanted.float()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
