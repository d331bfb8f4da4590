"""The folder around a graph: config, tokenizer and the modules of sentence-transformers, as its readers expect them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.checkpoint.description import METHOD
from eckart.checkpoint.save import write_companions
from eckart.data import Pooling
from eckart.exports.base import ExportSource
from eckart.forms import FactoredLinear
from eckart.model import factored_modules
from eckart.quantization import prepare
from eckart.storage.layout import model_folder, read_json


def ready(source: ExportSource, quantize: str | None) -> list[str]:
    """Make the model what is traced: float32, and in forms that engines run well; in place.

    Two factors become two products. A pivoted form's reordering costs an engine more than its smaller factors save, so
    that it is converted to two factors in any case: it ran at 0.9 times the speed of the dense model in ONNX Runtime,
    two factors at 1.8 times.

    Returns:
        Notes for a report.
    """
    model = source.model
    notes = []
    if model.dtype != torch.float32:
        notes.append(f"stored as {model.dtype}, written as float32".replace("torch.", ""))
        model.float()
    pivoted = any(isinstance(form, FactoredLinear) and form.rounded_as for form in factored_modules(model).values())
    if quantize is not None or pivoted:
        notes += prepare(model, quantize or "int8")
    return notes


def read_pooling(source: ExportSource) -> tuple[Pooling | None, list[str]]:
    """How the folder's sentence embeddings are made, if a graph can make them; and notes."""
    if not (source.folder / "modules.json").is_file():
        return None, []
    pooling = Pooling.from_folder(source.folder)
    if pooling is None or pooling.left_out:
        reasons = ", ".join(pooling.left_out) if pooling is not None else "there is no module Pooling"
        return None, [f"the graph ends with the model's own outputs: {reasons}"]
    return (pooling.reading(source.tokenizer) if source.tokenizer is not None else pooling), []


def place(source: ExportSource, staging: Path, subfolder: str) -> Path:
    """The folder inside the staging folder that the graph is written to."""
    inner = model_folder(source.folder).relative_to(source.folder)
    home = staging / inner / subfolder
    home.mkdir(parents=True)
    return home


def write_surroundings(source: ExportSource, staging: Path) -> None:
    """Write what lies around the graph: config, settings of generation, tokenizer, the other modules."""
    home = staging / model_folder(source.folder).relative_to(source.folder)
    plain_config(source.model).save_pretrained(home)
    generation = getattr(source.model, "generation_config", None)
    if generation is not None and source.model.can_generate():
        generation.save_pretrained(home)
    write_companions(staging, tokenizer=source.tokenizer, source_folder=source.folder)
    _name_tokenizer(home / "tokenizer_config.json")


def _name_tokenizer(file: Path) -> None:
    """Call a tokenizer without a class of its own by its old name too, which every transformers knows.

    Engines are often served with an older one: optimum-onnx 0.1.0 needs transformers 4.
    """
    if file.is_file():
        said = read_json(file)
        if said.get("tokenizer_class") == "TokenizersBackend":
            text = json.dumps(said | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, ensure_ascii=False)
            file.write_text(text + "\n", encoding="utf-8")


def plain_config(model: PreTrainedModel) -> Any:
    """The model's config without what only eckart reads."""
    config = copy.deepcopy(model.config)
    quantization = getattr(config, "quantization_config", None)
    if getattr(quantization, "quant_method", None) == METHOD:
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    return config
