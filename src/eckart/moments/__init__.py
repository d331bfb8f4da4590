"""Statistics of a site's inputs and output gradients, and the ways to gather them."""

from eckart.moments.accumulate import Fisher, Moments, SecondMoment
from eckart.moments.calls import common_calls, shared_inputs
from eckart.moments.curvature import generator, labeled_loss, sampled_loss
from eckart.moments.gatherer import Gatherer, Step, gather
from eckart.moments.halving import is_out_of_memory, release
from eckart.moments.norms import reading_norms
from eckart.moments.running import BatchLike, real_rows
from eckart.moments.together import merge, pack, unpack

__all__ = [
    "BatchLike",
    "Fisher",
    "Gatherer",
    "Moments",
    "SecondMoment",
    "Step",
    "common_calls",
    "gather",
    "generator",
    "is_out_of_memory",
    "labeled_loss",
    "merge",
    "pack",
    "reading_norms",
    "real_rows",
    "release",
    "sampled_loss",
    "shared_inputs",
    "unpack",
]
