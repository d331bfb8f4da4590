"""The kinds of quantization, by the names that `--quantize` takes. Read without torch."""

from __future__ import annotations

from eckart.errors import UsageError

KINDS = {
    "int8": "weights in 8 bits, a scale for each output; computed in floating point",
    "int8-dynamic": "weights in 8 bits, a scale for each output; inputs too while it runs, a scale for each token",
    "int4": "weights in 4 bits, a scale for each group of a row; computed in floating point",
}
"""Name -> what it is."""

BITS = {"int8": 8, "int8-dynamic": 8, "int4": 4}
"""Name -> bits of a stored number."""

GROUP = 32
"""Numbers of a row that share a scale in 4 bits, or the next smaller number that divides the row."""

SMALLEST_GROUP = 8
"""Rows that no number from here to :data:`GROUP` divides keep their floating-point numbers."""


def check_kind(kind: str) -> str:
    """The kind, if there is one of that name.

    Raises:
        UsageError: there is none.
    """
    if kind not in KINDS:
        raise UsageError(f"quantize {kind!r} is not known. Choose one of: {', '.join(KINDS)}.")
    return kind
