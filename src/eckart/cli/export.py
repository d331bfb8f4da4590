"""`eckart export`: a folder for programs without eckart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.console import check_json, guarded, show_published, write_json
from eckart.cli.options import JsonOption, PrivateOption, PushOption
from eckart.cli.push import check, push_published
from eckart.registry import EXPORTS

HELP = "Write a folder that programs without eckart load.\n\n" + "\n\n".join(
    f"{name}: {EXPORTS.about(name)['title']}." for name in EXPORTS
)


@guarded
def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder that eckart published, or its hub name.")],
    output_dir: Annotated[Path, typer.Option(help="Folder to publish; it must not exist yet.")],
    format: Annotated[str, typer.Option(help=f"One of: {', '.join(EXPORTS)}.")] = "dense",
    quantize: Annotated[
        str | None, typer.Option(help="Round the weights too: int8, int8-dynamic (inputs as well) or int4.")
    ] = None,
    drop_adaptive: Annotated[
        bool,
        typer.Option("--drop-adaptive", help="Leave out early exit and token skipping: the whole model is exported."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that eckart published.")] = False,
    json: JsonOption = None,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow the model's own Python code to run.")
    ] = False,
) -> None:
    """(see HELP)."""
    check(push_to_hub, private)
    check_json(json, [folder, output_dir])

    from eckart.exports.pipeline import export

    published = export(
        folder, output_dir, format=format, quantize=quantize, revision=revision, drop_adaptive=drop_adaptive,
        overwrite=overwrite, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    show_published([], published, "" if format == "factored" else "; it loads without eckart")
    files = {str(file.relative_to(published)): file.stat().st_size for file in published.rglob("*") if file.is_file()}
    found = {"output_dir": str(published), "format": format, "quantize": quantize, "files": dict(sorted(files.items()))}
    write_json(json, found, [folder, output_dir])
    push_published(published, push_to_hub, private)


export.__doc__ = HELP + "\n\nExample: eckart export smol-70 --output-dir smol-70-dense"
