"""Ways to make quality come back after factoring."""

from eckart.recover.refit import refit

__all__ = ["refit"]
