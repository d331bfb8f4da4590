"""`eckart bench`: how fast a model is beside its original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli.console import check_json, guarded, say, say_device, show, write_json
from eckart.cli.options import JsonOption, NoPageOption, PageOption, options_of, recipe_from_cli, recipe_options
from eckart.cli.report import choose_page, write_found
from eckart.speed.recipe import BenchRecipe

LISTS = {
    "batch_sizes": "How many texts run at a time, separated by commas. Default: 1,32.",
    "lengths": "Tokens of a text, separated by commas; of causal models, of the prompt. Default: 128.",
}


@guarded
@recipe_options(BenchRecipe, *options_of(BenchRecipe), descriptions=LISTS)
def bench(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders or hub names of models.")],
    against: Annotated[
        str | None, typer.Option(help="Folder or hub name of the original, which is timed in turn with them.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw the results: a .png or .svg file.", rich_help_panel="Output"),
    ] = None,
    json: JsonOption = None,
    report: PageOption = None,
    no_report: NoPageOption = False,
    **options: Any,
) -> None:
    """Time models beside their original: latency, throughput, memory, and where the time goes.

    All run in turn in one process. Beside each speed-up stands what the fewer multiply-adds allow at best, and how fast
    the original is without any factoring in bfloat16 and with int8 weights. Of causal models reading the prompt
    (prefill) and making one more token (decode) are timed apart.

    Example: eckart bench smol-70 --against HuggingFaceTB/SmolLM2-135M --batch-sizes 1,32 --lengths 128,1024
    """
    inputs = [*folders, against]
    check_json(json, inputs)
    recipe = recipe_from_cli(BenchRecipe, None, options)

    from eckart.report.speed import render_bench
    from eckart.report.speed_plot import check_plot, plot_bench
    from eckart.speed.bench import bench as time_models

    if plot is not None:
        check_plot(plot)
    page = choose_page("bench", report, json, no_report)
    say_device(recipe.device)
    found = time_models(folders, against, recipe=recipe, report_progress=lambda message: say(message, "dim"))
    show(render_bench(found))
    write_json(json, found, inputs)
    write_found(page, found, ", ".join(folders))
    if plot is not None:
        plot_bench(found, plot)
        say(f"written to {plot}", "dim")
