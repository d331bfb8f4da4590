"""The plan: which form and rank every weight gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eckart.forms import Block, form_named

FORMAT_VERSION = 1
DENSE = "dense"


@dataclass(frozen=True)
class Choice:
    """How one weight is stored.

    Attributes:
        form: a form's name, or "dense" for a weight that stays as it is.
        rank: k, the number of columns of the left factor (of terms, in a Kronecker form); 0 for dense.
        block: (rows, columns) of the blocks that the form cuts the weight into; None for a form without blocks.
        basis: in a form that shares a basis, the site that holds the basis; None for the holder itself.
    """

    form: str
    rank: int = 0
    block: Block | None = None
    basis: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in `plan.json`: without what the form does not have."""
        entry: dict[str, Any] = {"form": self.form}
        if self.form != DENSE:
            entry["rank"] = self.rank
        if self.block is not None:
            entry["block"] = list(self.block)
        if self.basis is not None:
            entry["basis"] = self.basis
        return entry

    def stored(self, out_features: int, in_features: int) -> int:
        """Stored elements, indices included, the bias left out, and a basis that another site holds."""
        if self.form == DENSE:
            return out_features * in_features
        form = form_named(self.form)
        whole = form.size(out_features, in_features, self.rank, self.block).parameters
        return whole - (form.shared_elements(in_features, self.rank) if self.basis is not None else 0)

    def factor_elements(self, out_features: int, in_features: int) -> int:
        """Numbers of the two factors that it is made from; not for dense."""
        return form_named(self.form).factor_elements(out_features, in_features, self.rank, self.block)


@dataclass(frozen=True)
class Plan:
    """The choices for all sites of a model. A site is a weight that can be factored, by the name of its module.

    Attributes:
        choices: site -> how it is stored; sites that stay dense included.
        model: fingerprint of the model that the plan was made for, "" when unknown.
        predicted: site -> predicted change of the loss per sequence, where ranks were chosen by it.
        reasons: site -> why it is stored so, where measured seconds were weighed.
    """

    choices: dict[str, Choice]
    model: str = ""
    predicted: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def bases(self) -> list[tuple[str, ...]]:
        """Groups of sites that share a basis, the one that holds it first."""
        groups: dict[str, list[str]] = {}
        for name, choice in self.choices.items():
            if choice.basis is not None:
                groups.setdefault(choice.basis, [choice.basis]).append(name)
        return [tuple(group) for group in groups.values()]

    def to_json(self) -> dict[str, Any]:
        """As it is written to `plan.json`."""
        sites: dict[str, dict[str, Any]] = {}
        for name, choice in self.choices.items():
            sites[name] = choice.to_json()
            if name in self.predicted:
                sites[name]["predicted_loss"] = self.predicted[name]
            if name in self.reasons:
                sites[name]["reason"] = self.reasons[name]
        return {"format_version": FORMAT_VERSION, "model": self.model, "sites": sites}


def stored_elements(choices: Mapping[str, Choice], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Elements that the plan stores in the matrices of its sites."""
    return sum(choice.stored(*shapes[name]) for name, choice in choices.items())
