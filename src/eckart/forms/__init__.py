"""Stored forms of a weight. A new form is one file and one line in `FORMS`."""

from __future__ import annotations

from typing import Any

from eckart.errors import UsageError
from eckart.forms.base import Factored, FactoredLinear, Size
from eckart.forms.lowrank import LowRank
from eckart.forms.lowrank_sparse import LowRankSparse, MaskedLowRankSparse
from eckart.forms.pivoted import Pivoted

FORMS: dict[str, type[FactoredLinear]] = {form.form: form for form in (LowRank, Pivoted)}
"""Of a Linear or Conv1D, by name: what a rank alone describes, and a plan can choose."""

STORED: dict[str, type[FactoredLinear]] = {**FORMS, LowRankSparse.form: LowRankSparse}
"""Everything that a checkpoint may hold, by the name in its spec."""

__all__ = [
    "FORMS",
    "STORED",
    "Factored",
    "FactoredLinear",
    "LowRank",
    "LowRankSparse",
    "MaskedLowRankSparse",
    "Pivoted",
    "Size",
    "build",
    "form_named",
]


def form_named(name: str) -> type[FactoredLinear]:
    """The form of that name.

    Raises:
        UsageError: naming the forms there are.
    """
    if not isinstance(name, str) or name not in FORMS:  # read from JSON: anything may stand there
        raise UsageError(f"form {name!r} is unknown to this version of eckart; it knows {', '.join(FORMS)}.")
    return FORMS[name]


def build(spec: dict[str, Any]) -> FactoredLinear:
    """An uninitialised module from its JSON spec, as :meth:`FactoredLinear.spec` gives it.

    Raises:
        UsageError: if the form is unknown, a size is missing, of the wrong type or out of range.
    """
    if not isinstance(spec, dict) or "form" not in spec:
        raise UsageError(f"module spec {spec!r} names no form; it needs form, sizes and bias.")
    known = STORED.get(spec["form"]) if isinstance(spec["form"], str) else None
    form = known or form_named(spec["form"])
    sizes = {}
    for key in form.sizes:
        value = spec.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"module spec of form {spec['form']}: {key} must be a whole number, not {value!r}.")
        sizes[key] = value
    return form(**sizes, bias=bool(spec.get("bias", True)), source=spec.get("source", "linear"))
