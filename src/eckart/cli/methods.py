"""`eckart methods`: the methods, forms and recoveries there are."""

from __future__ import annotations

from eckart.cli.console import check_json, guarded, show, write_json
from eckart.cli.options import JsonOption
from eckart.compression.recipe import Recipe


@guarded
def methods(json: JsonOption = None) -> None:
    """List every method with its paper, what it needs, and what it is exact for; then the forms and the recoveries.

    `--method` takes a paper's whole procedure; `--metric`, `--form` and `--allocation` replace parts of it.

    Example: eckart compress MODEL --method drone --form pivoted --output-dir DIR
    """
    check_json(json, [])

    from eckart.report.catalog import describe_catalog, list_catalog

    show(list_catalog(str(Recipe.model_fields["method"].default)))
    write_json(json, describe_catalog(), [])
