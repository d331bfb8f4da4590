"""From curves and a budget to a plan."""

from eckart.allocate.loss import Curve, allocate, lower_hull
from eckart.allocate.plan import (
    DENSE,
    Choice,
    OverBudgetError,
    Plan,
    rank_steps,
    read_plan,
    smallest_keep,
    stored_elements,
)
from eckart.allocate.uniform import fitting_choices, uniform

__all__ = [
    "DENSE",
    "Choice",
    "Curve",
    "OverBudgetError",
    "Plan",
    "allocate",
    "fitting_choices",
    "lower_hull",
    "rank_steps",
    "read_plan",
    "smallest_keep",
    "stored_elements",
    "uniform",
]
