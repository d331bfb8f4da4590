"""`eckart export`: an ordinary checkpoint, for programs without eckart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.console import guarded, show
from eckart.errors import UsageError

FORMATS = ("dense",)


@guarded
def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder that eckart published, or its hub name.")],
    output_dir: Annotated[Path, typer.Option(help="Folder to publish; it must not exist yet.")],
    format: Annotated[str, typer.Option(help=f"One of: {', '.join(FORMATS)}.")] = "dense",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that eckart published.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow the model's own Python code to run.")
    ] = False,
) -> None:
    """Write a model that loads without eckart.

    dense: every factored weight is multiplied out. The result is an ordinary checkpoint, as large as the original, that
    computes what the compressed model computes.

    Example: eckart export smol-70 --output-dir smol-70-dense
    """
    if format not in FORMATS:
        raise UsageError(f"--format {format}: choose one of {', '.join(FORMATS)}.")

    from eckart.checkpoint.export import export_dense

    published = export_dense(
        folder, output_dir, revision=revision, overwrite=overwrite, trust_remote_code=trust_remote_code
    )
    show(f"published in {published}; it loads without eckart")
