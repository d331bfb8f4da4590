"""`eckart compare`: methods side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from eckart.cli.console import check_json, guarded, say, show, write_json
from eckart.cli.options import JsonOption, NoPageOption, PageOption, options_of, recipe_from_cli, recipe_options
from eckart.cli.report import choose_page, write_found
from eckart.compression.recipe import Recipe
from eckart.errors import UsageError


@guarded
@recipe_options(Recipe, *options_of(Recipe, "method", "keep", "plan", "strict"))
def compare(
    model: Annotated[str, typer.Argument(help="Hub name or folder of the model.")],
    methods: Annotated[str, typer.Option(help="Methods, separated by commas; `eckart methods` lists them.")],
    keep: Annotated[
        str, typer.Option(help="Fractions of the numbers that are stored afterwards, separated by commas.")
    ] = "0.7",
    json: JsonOption = None,
    report: PageOption = None,
    no_report: NoPageOption = False,
    **options: Any,
) -> None:
    """Compress a model by several methods at several sizes, and show what each costs; nothing is published.

    The data is read and run through the model once. Quality is measured on a part of it that was not calibrated on.

    Example: eckart compare MODEL --methods svd,fwsvd,drone,eckart --keep 0.9,0.7,0.5 --data texts.txt
    """
    recipe = recipe_from_cli(Recipe, model, options)
    check_json(json, recipe.inputs)
    names, keeps = split_words(methods, "--methods"), _fractions(keep)
    for each in keeps:
        recipe_from_cli(Recipe, None, {"keep": each})
    page = choose_page("compare", report, json, no_report)

    from eckart.compression.compare import compare as compare_methods
    from eckart.report.scores import render_comparison

    comparison = compare_methods(
        recipe.model, methods=names, keeps=keeps, recipe=recipe, report_progress=lambda message: say(message, "dim")
    )
    found = {"model": model, **comparison.as_dict()}
    show(render_comparison(found))
    write_json(json, found, recipe.inputs)
    write_found(page, found, model)


def split_words(value: str, option: str) -> list[str]:
    """The words between commas, each once.

    Raises:
        UsageError: there is none.
    """
    words = [word.strip() for word in value.split(",") if word.strip()]
    if not words:
        raise UsageError(f"{option} is empty. Give names separated by commas: {option} svd,drone")
    return list(dict.fromkeys(words))


def _fractions(value: str) -> list[float]:
    try:
        return [float(word) for word in split_words(value, "--keep")]
    except ValueError:
        raise UsageError(f"--keep {value}: give fractions separated by commas, such as 0.9,0.7,0.5") from None
