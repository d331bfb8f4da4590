"""Stored forms of a weight. A new form is one file and one line in `FORMS`."""

from __future__ import annotations

from typing import Any

from eckart.errors import UsageError
from eckart.forms.base import Block, Factored, FactoredLinear, Size
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

FORMS: dict[str, type[FactoredLinear]] = {form.form: form for form in (LowRank, Pivoted, Kronecker, SharedBasis)}
"""Of a Linear or Conv1D, by name: what a plan can choose."""

EMBEDDINGS: dict[str, type[FactoredEmbedding]] = {
    "lowrank": LowRankEmbedding,
    "kronecker": KroneckerEmbedding,
    "safe": SafeEmbedding,
}
"""Of a token embedding, by the word of `--embeddings`."""

_OTHERS: tuple[type[Factored], ...] = (LowRankSparse, *EMBEDDINGS.values(), TiedHead)
STORED: dict[str, type[Factored]] = {**FORMS, **{form.form: form for form in _OTHERS}}
"""Everything that a checkpoint may hold, by the name in its spec."""

__all__ = [
    "EMBEDDINGS",
    "FORMS",
    "STORED",
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
    "Size",
    "TiedHead",
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


def build(spec: dict[str, Any]) -> Factored:
    """An uninitialised module from its JSON spec, as :meth:`Factored.spec` gives it.

    Raises:
        UsageError: if the form is unknown, a size is missing, of the wrong type or out of range.
    """
    if not isinstance(spec, dict) or "form" not in spec:
        raise UsageError(f"module spec {spec!r} names no form; it needs form, sizes and bias.")
    name = spec["form"]
    form = STORED[name] if isinstance(name, str) and name in STORED else form_named(name)
    sizes: dict[str, Any] = {}
    for key in form.sizes:
        value = spec.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"module spec of form {spec['form']}: {key} must be a whole number, not {value!r}.")
        sizes[key] = value
    return form(**sizes, **form.options(spec))
