"""What a published folder, or a file of `--json`, says of itself: what its page is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eckart.errors import UsageError
from eckart.report.page.again import make_again
from eckart.report.page.pages import FILE
from eckart.storage.layout import read_json
from eckart.storage.report_file import MARK


@dataclass(frozen=True)
class Source:
    """What a page is made of.

    Attributes:
        name: of the folder or file.
        found: the report.
        page: where its page goes where nothing else is said.
        loading: lines of Python of a published folder.
        again: the command that makes it again.
        folder: the published folder; None for a file of `--json`.
    """

    name: str
    found: Mapping[str, Any]
    page: Path
    loading: str | None = None
    again: str | None = None
    folder: Path | None = None


def find_sources(path: Path) -> list[Source]:
    """What there is to be shown at a path.

    Args:
        path: a published folder, a file of `--json`, or a folder with such files.

    Raises:
        CheckpointError: a report cannot be read.
        UsageError: there is none.
    """
    if path.is_file():
        return [_of_file(path)]
    report = path / "eckart" / "report.json"
    if report.is_file():
        found = read_json(report)
        name = path.resolve().name
        again = make_again(found, name) if (path / "eckart" / "recipe.yaml").is_file() else None
        return [Source(name, found, path / FILE, _loading(path / "README.md"), again, path)]
    files = [file for file in sorted(path.glob("*.json")) if _is_ours(file)] if path.is_dir() else []
    if not files:
        raise UsageError(
            f"{path}: there is no report of eckart. Give a folder that eckart has published, or a file that --json "
            "of eckart compare, bench or eval has written."
        )
    return [_of_file(file) for file in files]


def _of_file(path: Path) -> Source:
    found = read_json(path)
    named = found.get("model")
    if isinstance(models := found.get("models"), list):  # of a benchmark
        of_models = [one for one in models if isinstance(one, dict) and one.get("role") == "model"]
        named = ", ".join(str(one.get("name")) for one in of_models)
    return Source(named if isinstance(named, str) and named else path.stem, found, path.with_suffix(".html"))


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            beginning = file.read(200).decode("utf-8", "replace")
    except OSError:
        return False
    return f'"written_by": "{MARK["written_by"]}"' in beginning


def _loading(card: Path) -> str | None:
    """The lines of Python of a model card, which stand first in it."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    return found[1] if found else None
