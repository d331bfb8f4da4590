"""`eckart compress`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli.console import guarded, say, show
from eckart.cli.options import asked, fields, recipe_options
from eckart.cli.run_file import read_run
from eckart.compression.checkpoint import compress_checkpoint
from eckart.compression.result import load_lines
from eckart.distributed import is_main
from eckart.errors import UsageError
from eckart.report.compression import render_compression


@guarded
@recipe_options(*fields())
def compress(
    model: Annotated[str | None, typer.Argument(help="Hub name or folder of the model to compress.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder to publish; it must not be there yet.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace a model folder that is there.")] = None,
    restart: Annotated[
        bool | None, typer.Option("--restart", help="Throw away what an unfinished run on this output has done.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A YAML file of these options (data_column: text); the command line overrides."),
    ] = None,
    **options: Any,
) -> None:
    """Factor a model's weights and publish the smaller model.

    The output is an ordinary checkpoint that `from_pretrained` loads wherever eckart is imported. Its folder
    `eckart/` holds the recipe, the plan and the report; `--config DIR/eckart/recipe.yaml` runs it again.

    Example: eckart compress HuggingFaceTB/SmolLM2-135M --keep 0.7 --data texts.txt --output-dir smol-70
    """
    content, where = read_run(config)
    recipe = asked(content, config, model, options)
    folder = output_dir or where.output_dir
    if recipe.model is None:
        raise UsageError("MODEL: there is none. Name a folder or a model on the hub: eckart compress MODEL ...")
    if folder is None:
        raise UsageError("--output-dir: there is none. Name the folder to publish: --output-dir DIR")
    result, published = compress_checkpoint(
        recipe,
        folder,
        overwrite=where.overwrite if overwrite is None else overwrite,
        restart=bool(restart),
        tell=lambda how: say(how, "dim"),
    )
    if not is_main():
        return
    show(
        render_compression(result.report),
        "",
        f"published in {published}; to load it:",
        "",
        load_lines(result, published),
    )
