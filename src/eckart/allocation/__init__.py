"""From curves and a budget to a plan."""

from eckart.allocation.loss import Curve, allocate, lower_hull
from eckart.allocation.plan import (
    DENSE,
    Choice,
    OverBudgetError,
    Plan,
    rank_steps,
    read_plan,
    smallest_keep,
    stored_elements,
)
from eckart.allocation.shared import Bases, largest_shared_rank, shared_uniform
from eckart.allocation.uniform import fitting_choices, uniform

__all__ = [
    "DENSE",
    "Bases",
    "Choice",
    "Curve",
    "OverBudgetError",
    "Plan",
    "allocate",
    "fitting_choices",
    "largest_shared_rank",
    "lower_hull",
    "rank_steps",
    "read_plan",
    "shared_uniform",
    "smallest_keep",
    "stored_elements",
    "uniform",
]
