"""`eckart eval`: the scores of a model beside those of its original."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from eckart.cli.console import check_json, guarded, say, say_device, show, write_json
from eckart.cli.options import JsonOption, options_of, recipe_from_cli, recipe_options
from eckart.evaluation.recipe import EvaluationRecipe


@guarded
@recipe_options(EvaluationRecipe, *options_of(EvaluationRecipe))
def evaluate_folder(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or hub name of the model to score.")],
    against: Annotated[
        str | None, typer.Option(help="Folder or hub name of the original, which is scored in the same way.")
    ] = None,
    json: JsonOption = None,
    **options: Any,
) -> None:
    """Score a model, and the original beside it by the same protocol.

    Causal models: perplexity and bits per byte on held-out text. Classifiers: accuracy, F1, Matthews. Embeddings:
    Spearman against gold scores of sentence pairs. Any model, with --against: how far its outputs are from the
    original's. Beside it stands what plain rounding of the same weights to int8 and int4 gives, and at what size.

    Example: eckart eval smol-70 --against HuggingFaceTB/SmolLM2-135M --data held.txt
    """
    inputs = [folder, against, options.get("data")]
    check_json(json, inputs)
    recipe = recipe_from_cli(EvaluationRecipe, None, options)

    from eckart.evaluation.pipeline import evaluate
    from eckart.report.scores import render_scores

    say_device(recipe.device)
    found = evaluate(folder, against, recipe=recipe, report_progress=lambda message: say(message, "dim"))
    show(render_scores(found))
    write_json(json, found, inputs)
