"""`eckart tune`: recovery, by training or in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli.console import guarded, say, show
from eckart.cli.options import recipe_options
from eckart.cli.run_file import read_run
from eckart.errors import UsageError
from eckart.recovery.pipeline import tune_checkpoint
from eckart.recovery.recipe import TuneRecipe, make_tune_recipe, with_recovery
from eckart.report.training import render_tuning

FIELDS = tuple(name for name in TuneRecipe.model_fields if name != "model")


@guarded
@recipe_options(*FIELDS, of=TuneRecipe)
def tune(
    model: Annotated[str | None, typer.Argument(help="Folder of the model to train, factored or dense.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder to publish; it must not be there yet.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace a model folder that is there.")] = None,
    restart: Annotated[
        bool | None, typer.Option("--restart", help="Throw away what an unfinished training on this output has done.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A YAML file of these options (data_column: text); the command line overrides."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="The same as --recovery.", rich_help_panel="What")] = None,
    **options: Any,
) -> None:
    """Make a compressed model's quality come back: train it from its original or on a task, or solve it again.

    The factors keep their form and size. The model is scored on held-out data before and after, and the better one is
    published. A training that was broken off goes on where it was: run the same command again. A dense model is
    trained likewise. A bare encoder gets a new classification head where the data have labels; where they have none, it
    learns the teacher's sentence embeddings.

    Example: eckart tune smol-40 --teacher HuggingFaceTB/SmolLM2-135M --data texts.txt --output-dir smol-40-tuned

    Example: eckart tune smol-40 --recovery refit --teacher MODEL --data texts.txt --output-dir smol-40-refitted

    Example: eckart tune bert-50 --recovery full --data train.tsv --data-label-column label --output-dir bert-50-task
    """
    content, where = read_run(config)
    named = {"model": model, "method": method}
    given = with_recovery({**options, **{k: v for k, v in named.items() if v is not None}}, "command line")
    content = with_recovery(content, f"--config {config}")
    if config is not None:
        make_tune_recipe(content, f"--config {config}")
    recipe = make_tune_recipe({**content, **given}, "command line")
    folder = output_dir or where.output_dir
    if folder is None:
        raise UsageError("--output-dir: there is none. Name the folder to publish: --output-dir DIR")
    result, published = tune_checkpoint(
        recipe,
        folder,
        overwrite=where.overwrite if overwrite is None else overwrite,
        restart=bool(restart),
        tell=lambda how: say(how, "dim"),
    )
    show(render_tuning(result.report), "", f"published in {published}")
