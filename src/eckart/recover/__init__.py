"""Ways to make quality come back after factoring."""

from eckart.recover.refit import Refit, refittable

__all__ = ["Refit", "refittable"]
