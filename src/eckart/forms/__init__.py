"""Stored forms of a weight. A new form is one file and one line in `FORMS`."""

from __future__ import annotations

from typing import Any

from eckart.errors import UsageError
from eckart.forms.base import Block, Factored, FactoredLinear, Size
from eckart.forms.kronecker import Kronecker
from eckart.forms.lowrank import LowRank
from eckart.forms.pivoted import Pivoted

FORMS: dict[str, type[FactoredLinear]] = {form.form: form for form in (LowRank, Pivoted, Kronecker)}

__all__ = [
    "FORMS",
    "Block",
    "Factored",
    "FactoredLinear",
    "Kronecker",
    "LowRank",
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
    form = form_named(spec["form"])
    sizes: dict[str, Any] = {}
    for key in form.sizes:
        value = spec.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"module spec of form {spec['form']}: {key} must be a whole number, not {value!r}.")
        sizes[key] = value
    return form(**sizes, bias=bool(spec.get("bias", True)), source=spec.get("source", "linear"))
