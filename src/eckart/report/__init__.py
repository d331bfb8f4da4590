"""What a run did, for people and programs."""

from eckart.report.record import make
from eckart.report.table import as_rich, as_text, card_rows

__all__ = ["as_rich", "as_text", "card_rows", "make"]
