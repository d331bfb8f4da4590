"""The page of any report of eckart, and the file that it is written to."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eckart.errors import UsageError
from eckart.lookup.version import VERSION
from eckart.report.page.bench import describe_bench
from eckart.report.page.blocks import Page
from eckart.report.page.comparison import describe_comparison
from eckart.report.page.compression import describe_compression
from eckart.report.page.render import MARK, render_page
from eckart.report.page.scores import describe_scores, list_scores
from eckart.report.page.spectra import Spectrum
from eckart.report.page.training import describe_tuning
from eckart.storage.files import write_file
from eckart.storage.report_file import finite

logger = logging.getLogger(__name__)

FILE = "eckart/report.html"
"""The page of a published folder."""

LOOKED_AT = 200
"""Bytes at the beginning of a file that say whether it is a page of eckart."""


def render_report(
    found: Mapping[str, Any],
    name: str,
    *,
    loading: str | None = None,
    again: str | None = None,
    scores: Mapping[str, Any] | None = None,
    spectra: Sequence[Spectrum] = (),
) -> str:
    """The page of what a command found, as HTML.

    Args:
        found: a report of a compression or a recovery, or what `compare`, `bench` or `evaluate` return; values of JSON.
        name: of the folder or the model.
        loading: of a published folder, the lines of Python that load it.
        again: the command that makes it again (:func:`eckart.report.page.again.make_again`).
        scores: of a published folder, what :func:`eckart.evaluate` says of it.
        spectra: of its weights, those that were asked for.

    Raises:
        UsageError: it is none of these, or lacks what they hold.
    """
    try:
        page = _describe(finite(found), name, loading, again, finite(scores) if scores is not None else None, spectra)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UsageError(
            f"{name}: not a whole report of eckart ({type(error).__name__}: {error}). Give a folder that eckart has "
            "published, or a file of its --json, of this version."
        ) from error
    return render_page(page, VERSION)


def render_or_warn(found: Mapping[str, Any], name: str, **more: Any) -> str | None:
    """As :func:`render_report`; None with a warning where it fails: hours of work are not lost for their picture."""
    try:
        return render_report(found, name, **more)
    except Exception as error:
        logger.warning("no report.html is written: %s", error)
        return None


def check_page_file(path: Path) -> None:
    """Refuse a file that could not be written, or that would replace something else than a page of eckart.

    Raises:
        UsageError: naming the file and the way out.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}. Make it, or choose another.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder. Name a file for the report, such as {path / 'report.html'}")
    try:
        foreign = path.exists() and path.stat().st_size and MARK.encode() not in path.read_bytes()[:LOOKED_AT]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}). Choose another file for the report.") from error
    if foreign:
        raise UsageError(f"{path} is there already and was not written by eckart. Choose another file for the report.")


def write_page(path: Path, html: str) -> None:
    """Write a page.

    Raises:
        UsageError: as :func:`check_page_file`; or the file cannot be written.
    """
    check_page_file(path)
    try:
        write_file(path, [html.encode("utf-8")])
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}). Choose another file for the report, or free some space."
        ) from error


def _describe(
    found: Mapping[str, Any],
    name: str,
    loading: str | None,
    again: str | None,
    scores: Mapping[str, Any] | None,
    spectra: Sequence[Spectrum],
) -> Page:
    sections = [list_scores(scores)] if scores is not None else []
    if found.get("kind") == "tune":
        return describe_tuning(found, name, loading=loading, again=again, scores=sections, spectra=spectra)
    if "sites" in found and "kept" in found:
        return describe_compression(found, name, loading=loading, again=again, scores=sections, spectra=spectra)
    if "rows" in found and "original" in found:
        return describe_comparison(found, name)
    if "rows" in found and "models" in found:
        return describe_bench(found, name)
    if "scores" in found and "protocol" in found:
        return describe_scores(found, name)
    raise KeyError("it is of no command that draws one")
