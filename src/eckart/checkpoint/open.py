"""Open a checkpoint in two steps: check it without loading it, then load model and tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.checkpoint.load import load
from eckart.checkpoint.mapped import load_mapped
from eckart.checkpoint.source import Purpose, inspect_source, resolve
from eckart.checkpoint.stored import stored_dtype, stored_size
from eckart.checkpoint.tokenizer import FILES, load_tokenizer
from eckart.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint that is checked and not loaded yet: :func:`find_checkpoint` makes it, :func:`open_model` loads it.

    Attributes:
        folder: the local folder.
        dtype: type of most of the stored numbers.
        elements: stored numbers, a tied weight once.
        bytes: their size.
        warnings: what is odd but not wrong.
        trust_remote_code: whether the model's own Python code may run.
    """

    folder: Path
    dtype: torch.dtype
    elements: int
    bytes: int
    warnings: tuple[str, ...]
    trust_remote_code: bool = False


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint that is loaded.

    Attributes:
        folder: the local folder.
        model: in float32 on the CPU, whatever the stored type; in the stored type where an accelerator will compute, or
            where the weights stay in their files.
        tokenizer: or None where there is none and none is needed.
        dtype: type of most of the stored numbers.
        elements: stored numbers, a tied weight once.
        bytes: their size.
        warnings: what is odd but not wrong.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: Any
    dtype: torch.dtype
    elements: int
    bytes: int
    warnings: tuple[str, ...]


def find_checkpoint(
    model: str | Path,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    purpose: Purpose = "compress",
) -> FoundCheckpoint:
    """Find a checkpoint and check that it is complete, safe to read, and neither factored nor quantized.

    Args:
        model: a folder, or a name on the hub.
        revision: branch, tag or commit on the hub.
        trust_remote_code: accept a model that brings its own Python code.
        purpose: what it is opened for, which the ways out fit.

    Raises:
        CheckpointError: it is not there, damaged or pickled.
        ModelError: it is factored or quantized already.
    """
    folder = resolve(str(model), revision, trust_remote_code=trust_remote_code)
    checked = inspect_source(folder, trust_remote_code=trust_remote_code, purpose=purpose)
    for warning in checked.warnings:
        logger.warning(warning)
    elements, size = stored_size(checked.tensors)
    dtype = stored_dtype(checked.tensors) or torch.float32
    return FoundCheckpoint(folder, dtype, elements, size, tuple(checked.warnings), trust_remote_code)


def open_model(
    found: FoundCheckpoint, *, device: str | None = None, needs_text: str | None = None, scratch: Path | None = None
) -> OpenedModel:
    """Load model and tokenizer; the tokenizer first, since it loads faster and is missing more often.

    Args:
        found: what :func:`find_checkpoint` returned.
        device: the device that will compute.
        needs_text: what reads text and so needs a tokenizer, for the message; None if nothing does.
        scratch: given, the weights stay in their files (:func:`eckart.checkpoint.mapped.load_mapped`), and those that
            transformers computes while it loads are written to this folder.

    Raises:
        CheckpointError: the tokenizer is needed and missing, or the weights are not the model's.
    """
    tokenizer = load_tokenizer(found.folder, trust_remote_code=found.trust_remote_code)
    if tokenizer is None and needs_text is not None:
        raise CheckpointError(
            f"{found.folder} has no tokenizer (looked for {', '.join(FILES[:4])}, ...), and {needs_text} reads text. "
            "Put the tokenizer's files into the folder (tokenizer.save_pretrained), use a method that needs no data "
            "(--method svd), or pass model-ready batches to eckart.compress from Python."
        )
    if scratch is not None:
        model = load_mapped(found.folder, scratch=scratch, trust_remote_code=found.trust_remote_code)
    else:
        dtype = found.dtype if device is not None and not device.startswith("cpu") else torch.float32
        model = load(found.folder, dtype=dtype, trust_remote_code=found.trust_remote_code)
    return OpenedModel(found.folder, model, tokenizer, found.dtype, found.elements, found.bytes, found.warnings)
