"""`eckart tune`: a recovery, by training or in closed form."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from eckart.cli.console import check_json, guarded, say, say_device, show_published, write_json
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
from eckart.recovery.recipe import TuneRecipe
from eckart.storage.publish import check_output


@guarded
@recipe_options(TuneRecipe, *options_of(TuneRecipe))
def tune(
    model: Annotated[str | None, typer.Argument(help="Folder of the model to train, factored or dense.")] = None,
    output_dir: MainOutputOption = None,
    overwrite: OverwriteOption = None,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Discard what an interrupted training on this output has done.",
                     rich_help_panel="Output"),
    ] = False,
    verify: VerifyOption = True,
    config: ConfigOption = None,
    json: JsonOption = None,
    **options: Any,
) -> None:  # fmt: skip
    """Recover the quality of a compressed model: train it on its original or on a task, or solve its factors again.

    The factors keep their form and size. The model is scored on held-out data before and after, and the better one is
    published. An interrupted training resumes when the same command is given again. A dense model is trained in the
    same way. A bare encoder gets a new classification head where the data have labels; where they have none, it
    learns the teacher's sentence embeddings.

    Example: eckart tune smol-40 --teacher HuggingFaceTB/SmolLM2-135M --data texts.txt --output-dir smol-40-tuned

    Example: eckart tune smol-40 --recovery refit --teacher MODEL --data texts.txt --output-dir smol-40-refitted

    Example: eckart tune bert-50 --recovery full --data train.tsv --data-label-column label --output-dir bert-50-task
    """
    content, output = read_run(config)
    recipe = recipe_from_cli(TuneRecipe, model, options, content, f"--config {config}")
    folder, replace = output.override(output_dir, overwrite)
    check(push_to_hub, private)
    inputs = [config, folder, *recipe.inputs]
    check_json(json, inputs)

    from eckart.recovery.pipeline import tune as run
    from eckart.report.training import render_tuning

    check_output(folder, overwrite=replace, inputs=[config])
    say_device(recipe.device)
    result = run(
        recipe.model, recipe=recipe, output_dir=folder, overwrite=replace, restart=restart, verify=verify,
        report_progress=lambda message: say(message, "dim"),
    )  # fmt: skip
    show_published([render_tuning(result.report), ""], result.folder)
    write_json(json, {"output_dir": str(result.folder), **result.report}, inputs)
    say_page(result.folder)
    push_published(result.folder, push_to_hub, private)
