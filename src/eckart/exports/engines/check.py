"""What is refused before any work: missing libraries, models that are no function of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from eckart.errors import UsageError
from eckart.exports.base import ExportSource
from eckart.exports.engines.trace import describe


def need(libraries: Sequence[str], extra: str, name: str) -> None:
    """Refuse where a library is missing.

    Raises:
        UsageError: one is.
    """
    missing = [library for library in libraries if find_spec(library) is None]
    if missing:
        raise UsageError(
            f"--format {name} needs {', '.join(missing)}, which is not installed: pip install 'eckart[{extra}]'"
        )


def check_source(source: ExportSource) -> None:
    """Refuse models that no graph is written for.

    Raises:
        ModelError: this is one.
    """
    describe(source.model, source.tokenizer)
