"""`eckart inspect`: which weights can be factored."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from eckart.cli.console import check_json, guarded, say_device, show, write_json
from eckart.cli.options import JsonOption, recipe_from_cli, recipe_options
from eckart.compression.recipe import Recipe

FIELDS = ("targets", "ignore", "revision", "trust_remote_code", "device")


@guarded
@recipe_options(Recipe, *FIELDS)
def inspect(
    model: Annotated[str, typer.Argument(help="Hub name or folder of the model.")],
    json: JsonOption = None,
    **options: Any,
) -> None:
    """Show the weights of a model that can be factored, their spectra, and what is left dense and why.

    A low effective rank promises a small error of the weight itself. How much of a weight the data needs is measured
    by `eckart compare`.

    Example: eckart inspect bert-base-uncased --ignore "*.attention.*"
    """
    recipe = recipe_from_cli(Recipe, model, options)
    check_json(json, recipe.inputs)

    from eckart.evaluation.inspection import inspect as inspect_model
    from eckart.report.inspection import render_inspection

    say_device(recipe.device)
    chosen = {name: getattr(recipe, name) for name in FIELDS}
    found = inspect_model(model, **chosen)
    show(render_inspection(found))
    write_json(json, found, recipe.inputs)
