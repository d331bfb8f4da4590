"""The model card of a published folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("card.md.jinja")
Measured = Mapping[str, Any]


def render_model_card(
    name: str,
    *,
    base_model: str | None = None,
    auto_class: str = "AutoModel",
    library_name: str = "transformers",
    method: str | None = None,
    form: str | None = None,
    alone: bool = False,
    command: str | None = None,
    measured: Measured | None = None,
    tags: Sequence[str] = (),
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    pipeline_tag: str | None = None,
) -> str:
    """Write the card. It states no number that is not in ``measured``.

    Args:
        name: what the folder will be loaded as.
        base_model: hub name of the original; a local path is mentioned by its last part only.
        auto_class: the class in the code example, such as ``AutoModelForCausalLM``.
        library_name: ``transformers`` or ``sentence-transformers``.
        method: the method's name.
        form: the stored form or forms.
        alone: whether it loads without eckart.
        command: the command line that made the model.
        measured: number by name, or a mapping of columns (``{"original": 18.2, "eckart": 18.9}``) by name.
        tags: added to eckart's own.
        license: of the original.
        language: of the original.
        pipeline_tag: of the original.

    Returns:
        Markdown with its metadata block.
    """
    on_hub = base_model if base_model and _hub_name(base_model) else None
    data = ModelCardData(
        base_model=on_hub,
        library_name=library_name,
        license=license,
        language=list(language) if language is not None and not isinstance(language, str) else language,
        pipeline_tag=pipeline_tag,
        tags=["eckart", "low-rank", "compression", *tags],
        base_model_relation="quantized" if on_hub else None,
    )
    header, rows = _table(measured or {})
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        short_name=Path(name).name,
        original=on_hub or (Path(base_model).name if base_model else None),
        auto_class=auto_class,
        sentence=library_name == "sentence-transformers",
        method=method,
        form=form,
        alone=alone,
        command=command,
        header=header,
        rows=rows,
    )
    return str(card)


def _hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name) is not None and not Path(name).exists()


def _table(measured: Measured) -> tuple[list[str], list[list[str]]]:
    """Header and rows; the columns are those of the mappings, in the order they come."""
    columns: dict[str, None] = {}
    for value in measured.values():
        columns |= dict.fromkeys(value if isinstance(value, Mapping) else ("value",))
    rows = [
        [_cell(name)]
        + [_cell((value if isinstance(value, Mapping) else {"value": value}).get(column)) for column in columns]
        for name, value in measured.items()
    ]
    return ["measured", *map(_cell, columns)], rows


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(str(value).replace("|", "\\|").split())
