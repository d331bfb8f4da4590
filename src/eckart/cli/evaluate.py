"""`eckart eval`: the scores of a model beside those of its original."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from eckart.cli.console import check_json, guarded, show, write_json
from eckart.cli.options import JsonOption, recipe_options
from eckart.compression.recipe import Recipe

DATA = ("data", "data_config", "data_split", "data_column", "data_target_column", "data_label_column",
        "data_revision", "num_samples", "max_seq_length", "batch_size", "device")  # fmt: skip

WORDS = {
    "data": "Text or labeled rows: a file, a folder, a hub data set, or 'stdlib'. Default: WikiText-2.",
    "data_split": "Split of the hub data set. Default: test, and of 'stdlib' the held-out modules.",
    "num_samples": "Rows, windows or sentences to score.",
}


@guarded
@recipe_options(Recipe, *DATA, descriptions=WORDS)
def evaluate_folder(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or hub name of the model to score.")],
    against: Annotated[str | None, typer.Option(help="The original: scored by the same protocol, beside it.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="What is scored: perplexity, ... Default: what fits the model and the data."),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Another name for --max-seq-length.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Only the first so many tokens of running text.")] = None,
    baselines: Annotated[bool, typer.Option(help="Score the original rounded to int8 and int4 as well.")] = True,
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
    if window is not None:
        options["max_seq_length"] = window

    from eckart.evaluation.evaluation import evaluate
    from eckart.report.scores import render_scores

    device = options.pop("device", None)
    found = evaluate(folder, against, task=task, max_tokens=max_tokens, baselines=baselines, device=device, **options)
    show(render_scores(found))
    write_json(json, found, inputs)
