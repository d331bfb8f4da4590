"""`eckart methods`: what there is to choose from."""

from __future__ import annotations

from eckart.cli.console import guarded, show
from eckart.compression.recipe import Recipe
from eckart.report.catalog import list_catalog


@guarded
def methods() -> None:
    """List every method with its paper, what it needs, and what it is optimal for; then the forms and the recoveries.

    `--method` takes a paper's whole procedure; `--metric`, `--form` and `--allocation` replace parts of it.

    Example: eckart compress MODEL --method drone --form pivoted --output-dir DIR
    """
    show(list_catalog(str(Recipe.model_fields["method"].default)))
