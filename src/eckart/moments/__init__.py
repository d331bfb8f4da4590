"""Statistics of a site's inputs and output gradients, and the ways to gather them."""

from eckart.moments.accumulate import Fisher, Moments, SecondMoment
from eckart.moments.curvature import generator, labelled_loss, sampled_loss
from eckart.moments.hooks import BatchLike, gather, shared_inputs

__all__ = [
    "BatchLike",
    "Fisher",
    "Moments",
    "SecondMoment",
    "gather",
    "generator",
    "labelled_loss",
    "sampled_loss",
    "shared_inputs",
]
