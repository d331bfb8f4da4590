"""How many numbers a compressed model may store."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from eckart.allocation import smallest_keep
from eckart.calibration import NO_GRADIENT, UNREACHED
from eckart.compression.recipe import Recipe
from eckart.errors import UsageError
from eckart.evaluation.sizes import count_sizes
from eckart.model import Sites, saved_embedding_parameters


@dataclass(frozen=True)
class Budget:
    """The number of elements that may be stored, and what `keep` is a fraction of.

    Attributes:
        elements: what the matrices of all sites together may store.
        outside: what the rest of the model stores, where `keep` is a fraction of the whole model; else 0.
        dense: what `keep` is a fraction of.
        keep: the fraction that was asked for.
        of: what it is a fraction of: "sites", "model", or "reached" for the sites that data reached.
    """

    elements: int
    outside: int
    dense: int
    keep: float
    of: str

    @classmethod
    def of_recipe(cls, model: nn.Module, sites: Sites, recipe: Recipe) -> Budget:
        """Compute the budget of a recipe."""
        inside = sum(site.elements for site in sites.chosen)
        whole = count_sizes(model).model.elements if recipe.keep_of == "model" else inside
        outside = whole - inside
        if recipe.keep_of == "model":  # embeddings count at the size that they will have
            outside -= saved_embedding_parameters(model, recipe.embeddings, recipe.embeddings_keep, recipe.ignore)
        elements = int(round(recipe.keep * whole, 6)) - outside
        return cls(elements, outside, whole, recipe.keep, recipe.keep_of)

    def leaving_out(self, dense: int) -> Budget:
        """The budget where sites of so many elements stay dense because no data reached them.

        They are stored whatever `keep` is. Of the reached sites it is a fraction without them; of all sites, and of the
        model, the others pay for them.
        """
        if self.of != "reached" or not dense:
            return self
        elements = int(round(self.keep * (self.dense - dense), 6)) + dense
        return Budget(elements, -dense, self.dense - dense, self.keep, self.of)

    def make_error(self, needed: int, why: str, dense: str = "") -> UsageError:
        """Make the error for a budget that is too small.

        Args:
            needed: elements that would be enough for the sites.
            why: what does not fit.
            dense: what :func:`describe_dense` says of sites that stay dense.
        """
        least = smallest_keep(needed + self.outside, self.dense)
        return UsageError(
            f"--keep {self.keep:g} --keep-of {self.of}: {why}. The smallest keep that can be reached is {least:.4f}: "
            f"raise --keep, or name more --targets.{f' {dense}' if dense else ''}"
        )


def describe_dense(dense: Mapping[str, str], shapes: Mapping[str, tuple[int, int]], of: str) -> str:
    """What sites that stay dense hold, why, and what can be done; empty where there are none.

    Args:
        dense: their names -> why.
        shapes: of all sites.
        of: what `keep` is a fraction of.
    """
    held = {name: rows * columns for name, (rows, columns) in shapes.items()}
    left = [name for name in dense if name in held]
    if not left:
        return ""
    groups: dict[str, list[str]] = {}
    for name in left:
        groups.setdefault(dense[name], []).append(name)
    named = "; ".join(f"{_list_names(names)} ({REASONS.get(why, why)})" for why, names in groups.items())
    paid = "beside that fraction" if of == "reached" else f"and the other sites pay for {_it(left)}"
    ways = [f"leave {_it(left)} out: {' '.join(f'--ignore {shlex.quote(kind)}' for kind in _kinds(left)[:KINDS])}"]
    if UNREACHED in groups:
        routed = any("expert" in name for name in groups[UNREACHED])
        more = "more text (--num-samples)" if routed else "data that reach them (from Python, batches of all inputs)"
        ways.insert(0, f"give {more}")
    if of != "reached":
        ways.append("count the others alone: --keep-of reached")
    numbers, total = sum(held[name] for name in left), sum(held.values())
    advice, stay = "; or ".join(ways), "stays" if len(left) == 1 else "stay"
    return (
        f"{len(left)} of {len(held)} sites, {numbers:,} of {total:,} numbers, {stay} dense, {paid}: {named}. "
        f"{advice[0].upper()}{advice[1:]}."
    )


NAMED = 8
"""Sites, or kinds of them, that a message names."""

KINDS = 3
"""Kinds of sites that a command in a message names."""

REASONS = {NO_GRADIENT: "the output that is used does not depend on it: the loss has no gradient there"}
"""Why some sites stay dense, where others have what these lack."""


def _it(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _kinds(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
