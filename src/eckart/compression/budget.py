"""How many numbers a compressed model may store."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from eckart.allocation import smallest_keep
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
        of: what it is a fraction of, "sites" or "model".
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
        whole = inside if recipe.keep_of == "sites" else count_sizes(model).model.elements
        outside = whole - inside
        if recipe.keep_of == "model":  # embeddings count at the size that they will have
            outside -= saved_embedding_parameters(model, recipe.embeddings, recipe.embeddings_keep, recipe.ignore)
        elements = int(round(recipe.keep * whole, 6)) - outside
        return cls(elements, outside, whole, recipe.keep, recipe.keep_of)

    def make_error(self, needed: int, why: str) -> UsageError:
        """Make the error for a budget that is too small; `needed` elements would be enough for the sites."""
        least = smallest_keep(needed + self.outside, self.dense)
        return UsageError(
            f"--keep {self.keep:g} --keep-of {self.of}: {why}. The smallest keep that can be reached is {least:.4f}: "
            "raise --keep, or name more --targets."
        )
