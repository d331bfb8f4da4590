"""Checks on a model folder before anything of it is loaded, and where to get it from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from eckart.checkpoint.description import is_ours
from eckart.config import is_too_long
from eckart.errors import CheckpointError, EckartError, ModelError
from eckart.storage.layout import model_folder, read_json, require_files_inside, sentence_modules
from eckart.storage.shards import TensorEntry, read_weights

WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "LICENSE*",
]
UNWANTED = ["onnx/*", "openvino/*", "original/*", "consolidated*.safetensors", "*.fp16.safetensors"]


Purpose = Literal["compress", "inspect"]
"""What a model is opened for."""


@dataclass(frozen=True)
class SourceReport:
    """What a source folder holds.

    Attributes:
        folder: the folder with ``config.json``.
        config: its content.
        weight_files: the safetensors files that will be read.
        tensors: name -> dtype, shape and file.
        warnings: what is odd but not wrong, to be shown and reported.
    """

    folder: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    tensors: dict[str, TensorEntry]
    warnings: list[str] = field(default_factory=list)


def inspect_source(folder: Path, *, trust_remote_code: bool = False, purpose: Purpose = "compress") -> SourceReport:
    """Check that a folder is whole, safe to read and not factored yet.

    Args:
        folder: a model folder; for sentence-transformers the one with ``modules.json`` will do.
        trust_remote_code: accept a config that names Python files to run.
        purpose: what it is opened for, which the ways out fit.

    Returns:
        What the folder holds.

    Raises:
        CheckpointError: the folder is incomplete, damaged, or not to be trusted.
        ModelError: the model is factored, quantized, or an adapter.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is not a folder. Check the path, or use a name on the hub: org/model.")
    require_files_inside(Path(folder))
    folder = model_folder(Path(folder))
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(_no_config(folder))
    config = read_json(path)
    warnings: list[str] = []
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            warnings += _remote_code(folder / name, trust_remote_code)
    for key, quantization in _quantizations(config):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if is_ours(method) and quantization.get("adaptive") and not quantization.get("modules"):
            names = tuple(quantization["adaptive"].get("behaviors", {}))
            raise ModelError(
                f"{folder} has {' and '.join(names)} (quantization_config.adaptive in config.json), which was made for "
                f"its weights as they are. {_whole_first(folder, names, purpose)}"
            )
        if is_ours(method):
            raise ModelError(
                f"{folder} is already factored ({key}.quant_method in config.json is eckart's). "
                f"{_original_instead(folder, purpose)}"
            )
        instead = "Inspect" if purpose == "inspect" else "Compress"
        then = "" if purpose == "inspect" else ", and quantize the result"
        raise ModelError(
            f"{folder} is quantized ({key}.quant_method in config.json is {method!r}). {instead} the original, "
            f"unquantized model{then}."
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json). Merge it into its base model first: peft's "
            "merge_and_unload(), then save_pretrained(...)."
        )
    weights = read_weights(folder, config.get("transformers_weights"))
    return SourceReport(folder, config, tuple(weights.files), weights.tensors, warnings + weights.warnings)


def resolve(
    model: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Find a model: a local folder as it is, anything else on the hub or in its cache.

    Pickled weights are never downloaded.

    Args:
        model: a folder, or a name such as ``org/model``.
        revision: branch, tag or commit on the hub.
        trust_remote_code: download Python files as well.
        local_files_only: look in the cache only.
        token: access token for the hub, as in huggingface_hub.

    Returns:
        The local folder.

    Raises:
        CheckpointError: there is no such folder or repository, or it holds no model.
    """
    if is_too_long(model):
        raise CheckpointError(f"{model[:80]!r}... is too long for a path or a name on the hub. Check it.")
    path = Path(os.path.expanduser(model))  # Path.expanduser raises for unknown users
    if path.is_dir():
        if not (model_folder(path) / "config.json").is_file():
            raise CheckpointError(_no_config(path))
        require_files_inside(path)
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file. Give the model's folder: {path.parent}")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", model):
        raise CheckpointError(
            f"{model} does not exist.{_near_folder(path)} Check the path (the current folder is {Path.cwd()}); names "
            "on the hub look like org/model."
        )
    try:
        folder = Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=[*WANTED, "*.py"] if trust_remote_code else WANTED,
                ignore_patterns=UNWANTED,
                local_files_only=local_files_only,
                token=token,
            )
        )
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionResolutionError,
        OSError,
    ) as error:
        raise CheckpointError(_unreachable(model, revision, error, _near_folder(path))) from error
    if not (model_folder(folder) / "config.json").is_file():
        raise CheckpointError(_no_config(folder))
    if not any(model_folder(folder).glob("*.safetensors")):
        raise CheckpointError(
            f"{model} has no safetensors weights on the hub (pickled ones are never downloaded). Use a "
            "revision that has them (--revision refs/pr/N of the hub's conversion bot), or convert the "
            "model and give the folder."
        )
    require_files_inside(folder)
    return folder


def _remote_code(path: Path, trusted: bool) -> list[str]:
    """Refuse, or with trust report, the Python files that a config wants to have run."""
    code = read_json(path).get("auto_map")
    if not code:
        return []
    named = sorted({str(entry) for entry in code.values()}) if isinstance(code, dict) else [str(code)]
    if not trusted:
        raise CheckpointError(
            f"auto_map in {path} asks to run the model's own Python code ({', '.join(named)}). Read that "
            "code and pass --trust-remote-code (trust_remote_code=True), or delete auto_map if "
            "transformers knows the architecture itself."
        )
    return [f"Remote code was trusted: auto_map in {path} names {', '.join(named)}."]


def _original_instead(folder: Path, purpose: Purpose) -> str:
    """The way out of a factored model."""
    if purpose == "inspect":
        shown = f", or see what this folder holds: eckart report {folder}"
        return f"Inspect the original model instead{shown if (folder / 'eckart' / 'report.json').is_file() else ''}."
    return (
        "Compress the original model instead, or turn this one into a dense model first: eckart export "
        f"{folder} --output-dir DENSE (in Python: eckart.densify(model))."
    )


def _whole_first(folder: Path, names: Sequence[str], purpose: Purpose) -> str:
    """The way out of a model that does less for easy inputs."""
    off = f"eckart export {folder} --drop-adaptive --output-dir WHOLE"
    if purpose == "inspect":
        return f"Inspect the model that it was made from, or take it off first: {off}."
    return (
        "Compress the model that it was made from, and let the result do less for easy inputs: eckart tune COMPRESSED "
        f"--recovery {names[0]}; or take it off first: {off}."
    )


def _quantizations(config: dict[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """Every non-empty quantization_config of a config and its sub-configs, with its dotted key."""
    for name, value in config.items():
        if name == "quantization_config" and value:
            yield key + name, value
        elif isinstance(value, dict) and name.endswith("config"):
            yield from _quantizations(value, f"{key}{name}.")


def _no_config(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir())
    inner = [path.parent.name for path in sorted(folder.glob("*/config.json"))]
    remedy = f"Did you mean {folder / inner[0]}?" if inner else "Give a folder written by save_pretrained(...)."
    named = (sentence_modules(folder) or []) and " and its modules.json names no folder with one"
    return f"{folder} has no config.json{named or ''} (found: {', '.join(found[:12]) or 'nothing'}). {remedy}"


def _near_folder(path: Path) -> str:
    """A question after the model folder whose name is nearest to one that is not there; "" for none."""
    parent = path.parent
    try:
        found = [each.name for each in parent.iterdir() if (model_folder(each) / "config.json").is_file()]
    except (OSError, EckartError):
        return ""
    names = {name.lower(): name for name in found}
    near = get_close_matches(path.name.lower(), names, 1)
    return f" Did you mean {parent / names[near[0]]}?" if near else ""


def _unreachable(model: str, revision: str | None, error: Exception, near: str) -> str:
    if isinstance(error, GatedRepoError):
        return f"{model} is gated on the hub. Ask for access on its page, then log in: hf auth login"
    if isinstance(error, RevisionNotFoundError | RevisionResolutionError):
        return f"{model} has no revision {revision!r} that can be found. Check --revision ({error})."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{model} is neither a folder here nor a model on the hub.{near} Check the name; private ones need: "
            "hf auth login"
        )
    if isinstance(error, HFValidationError):
        return (
            f"{model} is neither a folder here nor a valid name on the hub ({error}).{near} Names look like org/model."
        )
    return (
        f"{model} is not a folder here, not in the cache, and the hub cannot be reached.{near} Check the name and the "
        "connection (HF_HUB_OFFLINE), or download it elsewhere and give the folder."
    )
