"""`eckart report`: the page of a published folder, or of a file of `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli.console import STANDARD_OUTPUT, guarded, say, show
from eckart.cli.terminal import Verbatim
from eckart.distributed import is_main
from eckart.errors import UsageError


def choose_page(command: str, asked: Path | None, json: Path | None, no_report: bool) -> Path | None:
    """The file of the report of a command that publishes no folder; None for none.

    A file that was asked for and cannot be written is refused before any work is done; of one that was not, it is said.

    Raises:
        UsageError: the file that was asked for cannot be written, or none was asked for as well.
    """
    from eckart.report.page.pages import check_page_file

    if no_report:
        if asked is not None:
            raise UsageError(f"--report {asked} and --no-report contradict each other. Leave one of them out.")
        return None
    beside = json is not None and json != STANDARD_OUTPUT and (json.is_file() or not json.exists())
    page = asked or (json.with_suffix(".html") if json is not None and beside else Path(f"eckart-{command}.html"))
    try:
        check_page_file(page)
    except UsageError as error:
        if asked is not None:
            raise
        say(f"no report is written: {error}", "yellow")
        return None
    return page


def write_found(page: Path | None, found: Mapping[str, Any], name: str) -> None:
    """Write the report of a command that publishes no folder; of several processes one does."""
    from eckart.report.page.pages import render_or_warn, write_page

    if page is None or not is_main():
        return
    html = render_or_warn(found, name)
    if html is None:
        return
    try:
        write_page(page, html)
    except UsageError as error:
        say(f"no report is written: {error}", "yellow")
        return
    say(f"report: {page}", "dim")


def say_page(folder: Path | None) -> None:
    """Say where the report of a published folder is."""
    page = folder / "eckart" / "report.html" if folder is not None else None
    if page is not None and page.is_file():
        say(f"report: {page}", "dim")


@guarded
def report(
    path: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that eckart published, or a file that --json has written.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write. Default: eckart/report.html in the folder, or beside the file of --json."),
    ] = None,
    spectra: Annotated[
        list[str] | None,
        typer.Option(help="Also draw the singular values of these weights: names or globs. May be given again."),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of the original, whose spectra are drawn too. Default: the one that the "
                          "report names, where it is there."),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="File that `eckart eval DIR --json FILE` has written: its scores are shown too.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow the model's own Python code to run.")
    ] = False,
) -> None:  # fmt: skip
    """Write what a run asked for, did and measured as one HTML file, with pictures. It needs no network.

    Every command that publishes a folder does so by itself; this one draws more, or draws it again.

    Example: eckart report smol-70 --spectra "*.0.*q_proj" --scores scores.json
    """
    from eckart.report.page.folder import find_sources
    from eckart.report.page.pages import check_page_file, render_report, write_page
    from eckart.storage.layout import read_json
    from eckart.storage.manifest import renew

    sources = find_sources(path)
    if len(sources) > 1 and output is not None:
        raise UsageError(f"--output {output}: {path} holds {len(sources)} reports. Name one of the files.")
    if (spectra or scores) and sources[0].folder is None:
        raise UsageError("--spectra and --scores belong to a published folder. Leave them out, or give that folder.")
    for source in sources:
        target = output or source.page
        check_page_file(target)
        drawn = []
        if spectra and source.folder is not None:
            from eckart.report.page.read_spectra import read_spectra

            drawn = read_spectra(
                source.folder, source.found, spectra, original=original, trust_remote_code=trust_remote_code
            )
        html = render_report(
            source.found,
            source.name,
            loading=source.loading,
            again=source.again,
            scores=read_json(scores) if scores is not None else None,
            spectra=drawn,
        )
        write_page(target, html)
        if source.folder is not None and output is None:
            renew(source.folder, "eckart/report.html")
        show(Verbatim(f"written to {target}"))
    say("open it in a browser", "dim")
