"""A sentence-transformers folder: its modules in their order, its prompts and its length, in all layouts there are."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from eckart.data.pooling import MODES, Dense, LayerNorm, Pooling, normalize
from eckart.errors import DataError
from eckart.storage.layout import sentence_modules

OLD_NAMES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Switches of `1_Pooling/config.json` before sentence-transformers 6 -> modes, in the order of their embeddings."""

TEXT_CONFIGS = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json",
                "sentence_camembert_config.json", "sentence_albert_config.json", "sentence_xlm-roberta_config.json",
                "sentence_xlnet_config.json")  # fmt: skip
"""What the configuration of the first module has been called; the first one that is there is read."""

logger = logging.getLogger(__name__)


def read_pooling(folder: Path) -> Pooling | None:
    """Read how a sentence-transformers model makes an embedding.

    Args:
        folder: A model folder; `modules.json` names the parts, or `1_Pooling/config.json` is there.

    Returns:
        All of it but what `left_out` names; None if the folder has no pooling of tokens.

    Raises:
        DataError: If a file cannot be read or names a mode that there is not.
        CheckpointError: If a module's path leaves the folder.
    """
    paths = sentence_modules(folder)
    modules = json.loads((folder / "modules.json").read_bytes()) if paths is not None else []
    kinds = [str(part.get("type", "")) for part in modules]
    names = [kind.rpartition(".")[2] for kind in kinds]
    if paths is not None and "Pooling" not in names:
        return None
    place = names.index("Pooling") if "Pooling" in names else 0
    file = folder / (paths[place] if paths else "1_Pooling") / "config.json"
    config = _read_json(file)
    if config is None:
        return None
    named = config.get("pooling_mode") or [mode for name, mode in OLD_NAMES.items() if config.get(name)] or "mean"
    modes = (named,) if isinstance(named, str) else tuple(named)
    for mode in modes:
        if mode not in MODES:
            raise DataError(f"{file}: pooling mode {mode!r} is not known: use one of {', '.join(MODES)}")
    found: dict[str, Any] = {"modes": modes, "include_prompt": bool(config.get("include_prompt", True))}
    left_out = [f"module {name} before Pooling" for name in names[:place] if name != "Transformer"]
    left_out += [f"module {kind}" for kind in kinds if not kind.startswith("sentence_transformers.")]
    steps: list[Any] = []
    for name, path in list(zip(names, paths or (), strict=True))[place + 1 :]:
        step, problem = _read_step(name, folder / path)
        steps += [step] if step is not None else []
        left_out += [problem] if problem is not None else []
    if steps and steps[-1] is normalize:
        found["normalize"] = bool(steps.pop())
    text, reasons = _read_text_settings(folder / (paths[0] if paths else ""))
    general = _read_json(folder / "config_sentence_transformers.json") or {}
    prompts, default = general.get("prompts"), general.get("default_prompt_name")
    if isinstance(default, str) and isinstance(prompts, dict):
        found["prompt"] = str(prompts.get(default) or "")
    left_out += reasons
    if left_out:
        logger.warning("%s: not computed: %s", folder, "; ".join(left_out))
    return Pooling(steps=tuple(steps), truncate=general.get("truncate_dim"), left_out=tuple(left_out), **found, **text)


def why_not_embedded(folder: Path) -> str | None:
    """Why the embeddings of a sentence-transformers folder are not computed here, in words; None if they are."""
    if not (folder / "modules.json").is_file():
        return None
    pooling = read_pooling(folder)
    if pooling is None:
        return "its modules.json has no module Pooling"
    return "; ".join(pooling.left_out) or None


def _read_step(name: str, folder: Path) -> tuple[Any, str | None]:
    """A module after the pooling, or why it cannot be computed here; neither for one that does nothing."""
    if name in ("Transformer", "Dropout"):
        return None, None
    config: Mapping[str, Any] = _read_json(folder / "config.json") or {}
    reads = config.get("module_input_name", "sentence_embedding")
    if name in ("Dense", "Normalize", "LayerNorm") and {reads, config.get("module_output_name") or reads} != {
        "sentence_embedding"
    }:
        return None, f"module {name} of {reads}"
    if name == "Normalize":
        return normalize, None
    tensors = _read_tensors(folder) if name in ("Dense", "LayerNorm") else None
    if tensors is None:
        return None, f"module {name}"
    if name == "LayerNorm":
        return LayerNorm(tensors["norm.weight"], tensors["norm.bias"]), None
    activation = _activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    if activation is None:
        return None, f"module Dense with activation {config.get('activation_function')}"
    residual: Any = tensors.get("residual.weight", "same") if config.get("use_residual") else None
    return Dense(tensors["linear.weight"], tensors.get("linear.bias"), activation, residual), None


def _activation(name: Any) -> torch.nn.Module | None:
    """An activation of torch by its full name; nothing else is imported."""
    kind = getattr(torch.nn, str(name).rpartition(".")[2], None) if str(name).startswith("torch.nn.") else None
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        return None
    try:
        return kind()
    except TypeError:
        return None


def _read_tensors(folder: Path) -> dict[str, Tensor] | None:
    file = folder / "model.safetensors"
    if not file.is_file():
        return None
    try:
        return {name: tensor.float() for name, tensor in load_file(file).items()}
    except Exception as error:  # safetensors raises its own
        raise DataError(f"{file}: cannot be read ({error}): download the model again") from error


def _read_text_settings(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """How text is read, and what of it is not done here."""
    config = next((read for name in TEXT_CONFIGS if (read := _read_json(folder / name))), dict[str, Any]())
    found: dict[str, Any] = {"lower_case": bool(config.get("do_lower_case"))}
    arguments = config.get("processor_kwargs") or config.get("tokenizer_args") or {}
    length = arguments.get("model_max_length", config.get("max_seq_length"))
    if isinstance(length, int) and length > 0:
        found["max_seq_length"] = length
    reasons = [f"{key} of its text" for key in ("query_expansion", "processing_kwargs") if config.get(key)]
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        reasons.append(f"transformer_task {config['transformer_task']}")
    modality = (config.get("modality_config") or {}).get("text")
    if modality is not None and modality.get("method_output_name") not in (None, "last_hidden_state"):
        reasons.append(f"the output {modality['method_output_name']} of its model")
    return found, reasons


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: not readable as JSON ({error}): correct the file or download it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}: holds a {type(found).__name__}, not an object: download it again")
    return found
