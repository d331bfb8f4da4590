"""`eckart methods`: what there is to choose from."""

from __future__ import annotations

from eckart.cli.console import guarded, show
from eckart.compression.recipe import Recipe
from eckart.methods import METHODS
from eckart.recovery import RECOVERIES
from eckart.report import methods_table, recoveries_table


@guarded
def methods() -> None:
    """List every method with its paper, what it needs, and what it is exact for; then the forms and the recoveries.

    `--method` takes a paper's whole procedure; `--metric`, `--form` and `--allocation` replace parts of it.

    Example: eckart compress MODEL --method drone --form pivoted --output-dir DIR
    """
    default = str(Recipe.model_fields["method"].default)
    show(methods_table(METHODS.values(), default), "", recoveries_table(RECOVERIES.values()))
