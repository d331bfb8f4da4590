"""`eckart inspect`: which weights can be factored."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from eckart.cli.console import check_json, guarded, say_device, show, write_json
from eckart.cli.options import JsonOption, options_of, recipe_from_cli, recipe_options
from eckart.evaluation.recipe import InspectionRecipe


@guarded
@recipe_options(InspectionRecipe, *options_of(InspectionRecipe))
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
    recipe = recipe_from_cli(InspectionRecipe, model, options)
    check_json(json, recipe.inputs)

    from eckart.evaluation.inspection import inspect as inspect_model
    from eckart.report.inspection import render_inspection

    say_device(recipe.device)
    found = inspect_model(model, recipe=recipe)
    show(render_inspection(found))
    write_json(json, found, recipe.inputs)
