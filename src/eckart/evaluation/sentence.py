"""Whether a model's output is a sentence embedding, and how it is made."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from eckart.data import Pooling
from eckart.data.model_kind import has_head
from eckart.model import has_output_head

LANGUAGE_HEADS = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForPreTraining")
"""What loads classes that embedding models are saved in though nobody reads their head."""


def find_pooling(folder: Path | None, model: PreTrainedModel) -> Pooling | None:
    """How the sentence embedding of a model is made.

    Args:
        folder: where it came from; None for a model in memory.
        model: the model.

    Returns:
        What the folder says; None where it says nothing, or the output of a head is what the model is for.
    """
    if folder is None:
        return None
    if has_output_head(model):
        pipeline = (folder / "modules.json").is_file() and has_head(model.config, model, *LANGUAGE_HEADS)
        if not pipeline:
            return None
    return Pooling.from_folder(folder)
