"""Statistics of a site's inputs and output gradients, and the ways to gather them."""

from eckart.moments.accumulate import Fisher, Moments, SecondMoment
from eckart.moments.curvature import generator, labelled_loss, sampled_loss
from eckart.moments.hooks import BatchLike, Step, common_calls, gather, real_rows, shared_inputs

__all__ = [
    "BatchLike",
    "Fisher",
    "Moments",
    "SecondMoment",
    "Step",
    "common_calls",
    "gather",
    "generator",
    "labelled_loss",
    "real_rows",
    "sampled_loss",
    "shared_inputs",
]
