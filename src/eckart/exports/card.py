"""What the model card of an exported folder keeps of the folder that it was made from: origin, scores, latency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError

from eckart.errors import CheckpointError
from eckart.report.compression import SIZE_ROWS, list_card_rows
from eckart.report.origin import origin_of
from eckart.report.training import list_tuning_card_rows
from eckart.storage.layout import read_json

BEFORE = "before the export"
"""Column of the folder that was exported."""


def keep_of_card(folder: Path, *, exact: bool) -> dict[str, Any]:
    """What holds for the exported folder too.

    Args:
        folder: that is exported.
        exact: whether it puts out the same after the export, so that its results on the hub are those of the export.

    Returns:
        Arguments of :func:`eckart.report.card.render_model_card`: `base_model`, `license`, `language`, `pipeline_tag`,
        `measured` (the scores and times of the folder, as those before the export) and `results`.
    """
    kept: dict[str, Any] = {**origin_of(folder), "measured": read_measured(folder)}
    data = _card_data(folder)
    base = data.base_model if data is not None else None
    kept["base_model"] = base or _recipe_model(folder)
    if exact and data is not None:
        kept["results"] = list(data.eval_results or [])
    return kept


def read_measured(folder: Path) -> dict[str, Any]:
    """Scores and times that the report of a folder states, in rows of a card; sizes change with the export."""
    report = _report(folder)
    try:
        rows = list_tuning_card_rows(report) if report.get("kind") == "tune" else list_card_rows(report)
    except (KeyError, TypeError, AttributeError):  # of another version, or none
        return {}
    own = ("eckart", str(report.get("kept")))
    return {
        name: {BEFORE if column in own else column: value for column, value in row.items()}
        for name, row in rows.items()
        if name not in SIZE_ROWS
    }


def _report(folder: Path) -> Mapping[str, Any]:
    try:
        return read_json(folder / "eckart" / "report.json")
    except CheckpointError:
        return {}


def _card_data(folder: Path) -> Any:
    file = folder / "README.md"
    try:
        return ModelCard.load(file).data if file.is_file() else None
    except (ValueError, YAMLError):  # without metadata, or with broken metadata
        return None


def _recipe_model(folder: Path) -> str | None:
    """The name or folder of the original, as the report says it; a card tells the last part of a path alone."""
    recipe = _report(folder).get("recipe")
    model = recipe.get("model") if isinstance(recipe, Mapping) else None
    return model if isinstance(model, str) else None
