"""`eckart inspect`: what there is to factor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.checkpoint.open import find_checkpoint, open_model
from eckart.cli.console import check_json, guarded, show, write_json
from eckart.cli.options import asked, recipe_options
from eckart.evaluation.inspection import inspect_model
from eckart.report.inspection import render_inspection


@guarded
@recipe_options("targets", "ignore", "revision", "trust_remote_code")
def inspect(
    model: Annotated[str, typer.Argument(help="Hub name or folder of the model.")],
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file, too.")] = None,
    **options: Any,
) -> None:
    """Show a model's sites, their spectra, where the parameters are, and what is left alone and why.

    Low effective ranks promise small errors, but only of the weights themselves: what the data needs of a weight,
    `eckart compare` tells.

    Example: eckart inspect bert-base-uncased --ignore "*.attention.*"
    """
    check_json(json)
    recipe = asked({}, None, model, options)
    source = open_model(find_checkpoint(model, recipe.revision, trust_remote_code=recipe.trust_remote_code))
    found = inspect_model(source.model, recipe.targets, recipe.ignore, dtype=source.dtype)
    show(render_inspection(found))
    write_json(json, found)
