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
    """Elements that may be stored, and what they are a fraction of.

    Attributes:
        elements: of the matrices of all sites.
        outside: elements of the model that are counted but in no site; 0 where `keep` is of the sites.
        dense: what `keep` is a fraction of.
        keep: as it was asked for.
        of: "sites" or "model".
    """

    elements: int
    outside: int
    dense: int
    keep: float
    of: str

    @classmethod
    def of_recipe(cls, model: nn.Module, sites: Sites, recipe: Recipe) -> Budget:
        """The budget of a recipe's keep."""
        inside = sum(site.elements for site in sites.chosen)
        whole = inside if recipe.keep_of == "sites" else count_sizes(model).model.elements
        outside = whole - inside
        if recipe.keep_of == "model":  # embeddings count as they will be stored
            outside -= saved_embedding_parameters(model, recipe.embeddings, recipe.embeddings_keep, recipe.ignore)
        elements = int(round(recipe.keep * whole, 6)) - outside
        return cls(elements, outside, whole, recipe.keep, recipe.keep_of)

    def refusal(self, needed: int, why: str) -> UsageError:
        """The error of a budget that is too small: `needed` elements of the sites would do."""
        least = smallest_keep(needed + self.outside, self.dense)
        return UsageError(
            f"--keep {self.keep:g} --keep-of {self.of}: {why}. The smallest keep that can be reached is {least:.4f}: "
            "raise --keep, or name more --targets."
        )
