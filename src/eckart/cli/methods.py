"""`eckart methods`: the methods, forms and recoveries there are."""

from __future__ import annotations

from eckart.cli.console import guarded, show
from eckart.compression.recipe import Recipe


@guarded
def methods() -> None:
    """List every method with its paper, what it needs, and what it is exact for; then the forms and the recoveries.

    `--method` takes a paper's whole procedure; `--metric`, `--form` and `--allocation` replace parts of it.

    Example: eckart compress MODEL --method drone --form pivoted --output-dir DIR
    """
    from eckart.report.catalog import list_catalog

    show(list_catalog(str(Recipe.model_fields["method"].default)))
