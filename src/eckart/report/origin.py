"""What the model card of an original says of it that holds for what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError


def origin_of(folder: Path | None, *, same_task: bool = True) -> dict[str, Any]:
    """Read licence, language and task of the original from its model card.

    Args:
        folder: of the original.
        same_task: whether what is made of it still does the same.

    Returns:
        Arguments of :func:`eckart.report.card.render_model_card`.
    """
    file = folder / "README.md" if folder is not None else None
    if file is None or not file.is_file():
        return {}
    try:
        stated = ModelCard.load(file).data.to_dict()
    except (ValueError, YAMLError):  # a card without metadata, or with broken metadata, states nothing
        return {}
    keys = ("license", "language", *(("pipeline_tag",) if same_task else ()))
    return {key: stated[key] for key in keys if stated.get(key)}
