"""Stored forms of a weight: one form a file.

A new form is its file and one line in :data:`eckart.registry.FORMS` (of token embeddings: `EMBEDDINGS`). One of your
own is passed as a class, `eckart.compress(model, form=MyForm)`; :func:`register_form` makes it known where a saved
model is loaded.
"""

from __future__ import annotations

from typing import Any

from eckart.errors import UsageError
from eckart.forms.base import Factored, StoredSize
from eckart.forms.embedding import FactoredEmbedding
from eckart.forms.joint import Joint
from eckart.forms.kronecker import Kronecker
from eckart.forms.kronecker_embedding import KroneckerEmbedding
from eckart.forms.linear import Block, FactoredLinear
from eckart.forms.lowrank import LowRank
from eckart.forms.lowrank_embedding import LowRankEmbedding
from eckart.forms.lowrank_sparse import LowRankSparse, MaskedLowRankSparse
from eckart.forms.pivoted import Pivoted
from eckart.forms.pivoted_joint import PivotedJoint
from eckart.forms.safe_embedding import SafeEmbedding
from eckart.forms.shared_basis import SharedBasis
from eckart.forms.sliced import Sliced
from eckart.forms.tied_head import TiedHead
from eckart.lookup.registry import Registry
from eckart.registry import EMBEDDINGS, FORMS, OTHER_FORMS

__all__ = [
    "EMBEDDINGS",
    "FORMS",
    "OTHER_FORMS",
    "Block",
    "Factored",
    "FactoredEmbedding",
    "FactoredLinear",
    "Joint",
    "Kronecker",
    "KroneckerEmbedding",
    "LowRank",
    "LowRankEmbedding",
    "LowRankSparse",
    "MaskedLowRankSparse",
    "Pivoted",
    "PivotedJoint",
    "SafeEmbedding",
    "SharedBasis",
    "Sliced",
    "StoredSize",
    "TiedHead",
    "build",
    "embedding_named",
    "form_name",
    "form_named",
    "register_form",
]


def register_form(form: type[Factored]) -> str:
    """Make a form of one's own known in this process: for `form=`, `embeddings=` and for loading saved models.

    Args:
        form: a subclass of :class:`FactoredLinear` or :class:`FactoredEmbedding` whose attribute `form` is its name.

    Returns:
        The name that options take.

    Raises:
        UsageError: the class is not a form, has no name of its own, or has that of another form.
    """
    registry: Registry[Any]
    if isinstance(form, type) and issubclass(form, FactoredLinear):
        registry = FORMS
    elif isinstance(form, type) and issubclass(form, FactoredEmbedding):
        registry = EMBEDDINGS
    else:
        raise UsageError(
            f"form {form!r}: not a form; pass a name or a class that derives from eckart.forms.FactoredLinear, or from "
            "FactoredEmbedding for token embeddings."
        )
    if not isinstance(getattr(form, "form", None), str) or not form.form or form.form == "dense":
        raise UsageError(
            f"form {form.__name__}: has no name; set its class attribute `form` to one, other than 'dense'."
        )
    name = form_name(form)
    for others in (FORMS, EMBEDDINGS, OTHER_FORMS):
        if others is not registry and any(form.form == other.form for other in others.values()):
            raise UsageError(f"form {form.form!r}: another form has this name. Give {form.__name__} a name of its own.")
    registry.add(name, form)
    return name


def form_name(form: type[Factored]) -> str:
    """The name that options take: of token embeddings without `-embedding`, which it has in a file."""
    return form.form.removesuffix("-embedding") if issubclass(form, FactoredEmbedding) else form.form


def form_named(form: str | type[FactoredLinear]) -> type[FactoredLinear]:
    """The form of that name; a class is registered and returned.

    Raises:
        UsageError: with the nearest spelling and the names there are.
    """
    name = register_form(form) if isinstance(form, type) else form
    found: type[FactoredLinear] = FORMS[FORMS.check(name)]  # read from JSON: anything may stand there
    return found


def embedding_named(form: str | type[FactoredEmbedding]) -> type[FactoredEmbedding]:
    """The same for token embeddings."""
    name = register_form(form) if isinstance(form, type) else form
    found: type[FactoredEmbedding] = EMBEDDINGS[EMBEDDINGS.check(name)]
    return found


def build(spec: dict[str, Any]) -> Factored:
    """An uninitialized module from its JSON spec, as :meth:`Factored.spec` gives it.

    Raises:
        UsageError: if the form is unknown, a size is missing, of the wrong type or out of range.
    """
    if not isinstance(spec, dict) or "form" not in spec:
        raise UsageError(f"module spec {spec!r} names no form; it needs form, sizes and bias.")
    known, name = _by_stored_name(), spec["form"]
    if not isinstance(name, str) or name not in known:
        raise UsageError(
            f"form {name!r} is not known; known are: {', '.join(known)}. If it is a form of your own, import the "
            "module that defines it and call eckart.register_form on its class first; otherwise update eckart."
        )
    form = known[name]
    sizes: dict[str, Any] = {}
    for key in form.sizes:
        value = spec.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"module spec of form {name}: {key} must be a whole number, not {value!r}.")
        sizes[key] = value
    return form(**sizes, **form.options(spec))


def _by_stored_name() -> dict[str, type[Factored]]:
    """Every form by the name that it has in a file."""
    return {form.form: form for registry in (FORMS, EMBEDDINGS, OTHER_FORMS) for form in registry.values()}
