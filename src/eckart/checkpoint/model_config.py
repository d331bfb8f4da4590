"""`config.json` read as transformers reads it, and refused by file and reason where it cannot be."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from eckart.errors import CheckpointError
from eckart.storage.layout import read_json

logger = logging.getLogger(__name__)

TEXT_PARTS = ("text_config", "text_encoder", "decoder", "generator")
"""Blocks that transformers takes for the configuration of the text model, whatever the class makes of them."""

COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
          "num_decoder_layers", "num_local_experts", "num_experts", "n_routed_experts")  # fmt: skip
ALWAYS_BUILT = 1000
"""Layers or experts that are built without asking whether the files can hold so many."""


def read_model_config(home: Path, *, trust_remote_code: bool = False, settings: Mapping[str, Any] | None = None) -> Any:
    """Read the configuration of a model.

    Args:
        home: the folder with ``config.json``.
        trust_remote_code: allow the model's own Python code to run.
        settings: fields to be changed.

    Returns:
        The configuration without blocks that its class does not know or that are empty: transformers would stop at
        them, or take them for more than they are.

    Raises:
        CheckpointError: naming the file, and what transformers says about it.
    """
    path = home / "config.json"
    architectures = read_json(path).get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise CheckpointError(
            f"architectures in {path} is {str(architectures)[:100]!r}, not a list of names of classes. Mend it, or "
            "download the file again."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            home, trust_remote_code=trust_remote_code, local_files_only=True, **(settings or {})
        )
    except Exception as error:  # each class of configuration checks its fields in its own way
        raise CheckpointError(_unreadable(path, error)) from error
    known = getattr(type(config), "sub_configs", None) or {}
    for name in TEXT_PARTS:
        if name not in known and isinstance(getattr(config, name, None), dict):
            logger.warning("%s: %s is not read: %s has no such block.", path, name, type(config).__name__)
            delattr(config, name)
    if not getattr(config, "quantization_config", True):  # there, and empty
        delattr(config, "quantization_config")
    return config


def describe_unbuildable(home: Path, name: str, error: Exception) -> CheckpointError:
    """What is told of a configuration that its class of models cannot be built from."""
    path = home / "config.json"
    said = " ".join(str(error).split())[:300]
    return CheckpointError(
        f"{name} cannot be built from {path} ({type(error).__name__}: {said}): one of its fields has a value that the "
        "class does not know or that does not fit the others. Mend it, or download the file again."
    )


def require_countable(config: Any, home: Path, tensors: int) -> None:
    """Refuse more layers or experts than the files hold tensors, before they are built one by one.

    Raises:
        CheckpointError: naming the field.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())]
    for part in parts:
        for name in COUNTS:
            count = getattr(part, name, None)
            if isinstance(count, int) and count > max(ALWAYS_BUILT, tensors):
                raise CheckpointError(
                    f"{name} in {home / 'config.json'} is {count:,}, but the weight files hold {tensors:,} tensors. "
                    "Download the folder again."
                )


def _unreadable(path: Path, error: Exception) -> str:
    said = " ".join(str(error).split())[:300]
    if "trust_remote_code" in str(error):
        return (
            f"{path} needs the model's own Python code. Read that code and pass --trust-remote-code "
            "(trust_remote_code=True)."
        )
    return (
        f"{path} is no configuration that transformers {transformers.__version__} can read ({type(error).__name__}: "
        f"{said}). Mend the field, download the file again, or upgrade transformers."
    )
