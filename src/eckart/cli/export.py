"""`eckart export`: for those without eckart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.checkpoint.export import export_dense
from eckart.cli.console import guarded, show
from eckart.errors import UsageError

FORMATS = ("dense",)


@guarded
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that eckart published.")],
    output_dir: Annotated[Path, typer.Option(help="Folder to publish; it must not be there yet.")],
    format: Annotated[str, typer.Option(help=f"One of: {', '.join(FORMATS)}.")] = "dense",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that is there.")] = False,
) -> None:
    """Write a model that loads without eckart.

    dense: every factored weight is multiplied out. An ordinary checkpoint, as large as the original, with the
    compressed model's outputs.

    Example: eckart export smol-70 --output-dir smol-70-dense
    """
    if format not in FORMATS:
        raise UsageError(f"--format {format}: choose one of {', '.join(FORMATS)}.")
    show(f"published in {export_dense(folder, output_dir, overwrite=overwrite)}; it needs no eckart")
