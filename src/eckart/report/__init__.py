"""What a run did, for people and programs."""

from eckart.report.inspection import inspection_table, methods_table
from eckart.report.record import make
from eckart.report.scores import comparison_table, scores_table
from eckart.report.table import as_rich, as_text, card_rows, quality_cells
from eckart.report.training import recoveries_table, tuned_rich, tuned_rows

__all__ = [
    "as_rich",
    "as_text",
    "card_rows",
    "comparison_table",
    "inspection_table",
    "make",
    "methods_table",
    "quality_cells",
    "recoveries_table",
    "scores_table",
    "tuned_rich",
    "tuned_rows",
]
