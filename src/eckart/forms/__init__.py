"""Stored forms of a weight. A new form is one file and one line in :data:`eckart.registry.FORMS`."""

from __future__ import annotations

from typing import Any

from eckart.errors import UsageError
from eckart.forms.base import Block, Factored, FactoredLinear, StoredSize
from eckart.forms.embedding import (
    FactoredEmbedding,
    KroneckerEmbedding,
    LowRankEmbedding,
    SafeEmbedding,
)
from eckart.forms.kronecker import Kronecker
from eckart.forms.lowrank import LowRank
from eckart.forms.lowrank_sparse import LowRankSparse, MaskedLowRankSparse
from eckart.forms.pivoted import Pivoted
from eckart.forms.shared_basis import SharedBasis
from eckart.forms.tied_head import TiedHead
from eckart.registry import EMBEDDINGS, FORMS

_OTHERS: tuple[type[Factored], ...] = (LowRankSparse, *EMBEDDINGS.values(), TiedHead)

__all__ = [
    "EMBEDDINGS",
    "FORMS",
    "Block",
    "Factored",
    "FactoredEmbedding",
    "FactoredLinear",
    "Kronecker",
    "KroneckerEmbedding",
    "LowRank",
    "LowRankEmbedding",
    "LowRankSparse",
    "MaskedLowRankSparse",
    "Pivoted",
    "SafeEmbedding",
    "SharedBasis",
    "StoredSize",
    "TiedHead",
    "build",
    "form_named",
]


def form_named(name: str) -> type[FactoredLinear]:
    """The form of that name.

    Raises:
        UsageError: with the nearest spelling and the names there are.
    """
    found: type[FactoredLinear] = FORMS[FORMS.check(name)]  # read from JSON: anything may stand there
    return found


def build(spec: dict[str, Any]) -> Factored:
    """An uninitialized module from its JSON spec, as :meth:`Factored.spec` gives it.

    Raises:
        UsageError: if the form is unknown, a size is missing, of the wrong type or out of range.
    """
    if not isinstance(spec, dict) or "form" not in spec:
        raise UsageError(f"module spec {spec!r} names no form; it needs form, sizes and bias.")
    name = spec["form"]
    others = {form.form: form for form in _OTHERS}
    form = others[name] if isinstance(name, str) and name in others else form_named(name)
    sizes: dict[str, Any] = {}
    for key in form.sizes:
        value = spec.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"module spec of form {spec['form']}: {key} must be a whole number, not {value!r}.")
        sizes[key] = value
    return form(**sizes, **form.options(spec))
