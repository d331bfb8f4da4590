"""The model card of a published folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from eckart.report.loading import Loading

TEMPLATE = Path(__file__).with_name("card.md.jinja")
Measured = Mapping[str, Any]
ANY = Loading()
RECORDS = (
    "`eckart/recipe.yaml` holds every setting, `eckart/plan.json` what each weight became, `eckart/report.json` what "
    "was measured."
)


def render_model_card(
    name: str,
    *,
    loading: Loading | str = ANY,
    base_model: str | None = None,
    library_name: str | None = None,
    summary: str | None = None,
    method: str | None = None,
    form: str | None = None,
    notice: str | None = None,
    about: Sequence[str] = (),
    records: str = RECORDS,
    command: str | None = None,
    measured: Measured | None = None,
    results: Sequence[EvalResult] = (),
    tags: Sequence[str] = (),
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    pipeline_tag: str | None = None,
) -> str:
    """Write the card. It states no number that is not in ``measured``, ``results`` or ``about``.

    Args:
        name: what the folder will be loaded as.
        loading: how, see :func:`eckart.report.loading.find_loading`; or the lines of Python themselves, in which
            ``{name}`` stands for the name.
        base_model: hub name of the original; a local path is mentioned by its last part only.
        library_name: as the hub calls it; None for that of ``loading``.
        summary: what was done to the original, after "NAME, "; None for that it was made smaller, with method and form.
        method: the method's name.
        form: the stored form or forms.
        notice: what it takes to load it; None for what ``loading`` says of eckart.
        about: further paragraphs.
        records: what says how it was made.
        command: the command line that made the model.
        measured: number by name, or a mapping of columns (``{"original": 18.2, "eckart": 18.9}``) by name.
        results: for the hub's own table of results, see :func:`eckart.report.results.list_results`.
        tags: added to eckart's own.
        license: of the original.
        language: of the original.
        pipeline_tag: the task; None for that of ``loading``.

    Returns:
        Markdown with its metadata block.
    """
    on_hub = base_model if base_model and _hub_name(base_model) else None
    written = isinstance(loading, str)
    plain = Loading(needs_eckart=False) if isinstance(loading, str) else loading
    data = ModelCardData(
        base_model=on_hub,
        library_name=library_name or plain.library,
        license=license,
        language=list(language) if language is not None and not isinstance(language, str) else language,
        pipeline_tag=pipeline_tag or plain.task,
        tags=["eckart", "low-rank", "compression", *tags],
        base_model_relation="quantized" if on_hub else None,
        model_name=Path(name).name if results else None,
        eval_results=list(results) or None,
    )
    header, rows = format_rows(measured or {})
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        short_name=Path(name).name,
        original=name_original(base_model),
        lines=loading.replace("{name}", name).strip() if isinstance(loading, str) else plain.lines(name),
        summary=summary,
        method=method,
        form=form,
        alone=not plain.needs_eckart,
        notice="" if notice is None and written else notice,
        about=[*about],
        records=records,
        command=command,
        header=header,
        rows=rows,
    )
    return str(card)


def name_original(base_model: str | None) -> str | None:
    """How a card calls the original: its name on the hub, or the last part of its path; None where there is none."""
    if not base_model:
        return None
    return base_model if _hub_name(base_model) else Path(base_model).name


def _hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name) is not None and not Path(name).exists()


def format_rows(measured: Measured) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a card's table; the columns are those of the mappings, in the order they come."""
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
