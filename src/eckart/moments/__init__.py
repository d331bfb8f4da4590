"""Statistics of a site's inputs and output gradients, and the ways to gather them."""

from eckart.moments.calls import common_calls, shared_inputs
from eckart.moments.current_batch import BatchLike, real_tokens
from eckart.moments.curvature import generator, labeled_loss, sampled_loss
from eckart.moments.gatherer import Gatherer, Step, gather
from eckart.moments.halving import Halving, release, run_in_halves
from eckart.moments.norms import reading_norms
from eckart.moments.site import Moments, deserialize, serialize
from eckart.moments.statistic import (
    GradientStatistic,
    InputStatistic,
    SequenceStatistic,
    Statistic,
    needs_backward,
    statistics_named,
)

__all__ = [
    "BatchLike",
    "Gatherer",
    "GradientStatistic",
    "Halving",
    "InputStatistic",
    "Moments",
    "SequenceStatistic",
    "Statistic",
    "Step",
    "common_calls",
    "deserialize",
    "gather",
    "generator",
    "labeled_loss",
    "needs_backward",
    "reading_norms",
    "real_tokens",
    "release",
    "run_in_halves",
    "sampled_loss",
    "serialize",
    "shared_inputs",
    "statistics_named",
]
