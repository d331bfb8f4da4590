"""`eckart compress`: factor a model's weights and publish the smaller model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from eckart.cli.console import check_json, guarded, say, show_published, write_json
from eckart.cli.manner import MANNER
from eckart.cli.options import (
    ConfigOption,
    JsonOption,
    MainOutputOption,
    OverwriteOption,
    PrivateOption,
    PushOption,
    VerifyOption,
    options_of,
    recipe_from_cli,
    recipe_options,
)
from eckart.cli.push import check, push_published
from eckart.cli.report import say_page
from eckart.cli.run_file import read_run
from eckart.compression.recipe import Recipe
from eckart.distributed import is_main
from eckart.errors import UsageError


@guarded
@recipe_options(Recipe, *options_of(Recipe))
def compress(
    model: Annotated[str | None, typer.Argument(help="Hub name or folder of the model to compress.")] = None,
    output_dir: MainOutputOption = None,
    overwrite: OverwriteOption = None,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Discard what an interrupted run on this output has done.",
                     rich_help_panel="Output"),
    ] = False,
    verify: VerifyOption = True,
    config: ConfigOption = None,
    json: JsonOption = None,
    **options: Any,
) -> None:  # fmt: skip
    """Factor a model's weights and publish the smaller model.

    The output is an ordinary checkpoint that `from_pretrained` loads wherever eckart is imported. Its folder
    `eckart/` holds the recipe, the plan and the report; `--config DIR/eckart/recipe.yaml` runs it again.

    Example: eckart compress HuggingFaceTB/SmolLM2-135M --keep 0.7 --data texts.txt --output-dir smol-70
    """
    content, output = read_run(config)
    recipe = recipe_from_cli(Recipe, model, options, content, f"--config {config}")
    if recipe.model is None:
        of = f": --config {config} names none, such as the recipe of a model that was in memory" if config else ""
        raise UsageError(f"MODEL is missing{of}. Name a folder or a model on the hub: eckart compress MODEL ...")
    folder, replace = output.override(output_dir, overwrite)
    check(push_to_hub, private)
    inputs = [config, folder, *recipe.inputs]
    check_json(json, inputs)

    from eckart.compression.pipeline import compress as compress_model
    from eckart.compression.result import load_lines
    from eckart.report.compression import render_compression

    result = compress_model(
        recipe=recipe,
        output_dir=folder,
        overwrite=replace,
        inputs=[config],
        restart=restart,
        verify=verify,
        report_progress=lambda message: say(message, "dim"),
    )
    if is_main():
        lines = load_lines(result, result.folder or folder)
        show_published(
            [render_compression(result.report, warned=MANNER.warned), ""], result.folder, f"; to load it:\n\n{lines}"
        )
        write_json(json, {"output_dir": str(result.folder), **result.report}, inputs)
        say_page(result.folder)
    push_published(result.folder, push_to_hub, private)
