"""From curves and a budget to a plan."""

from eckart.allocate.loss import Curve, allocate, lower_hull
from eckart.allocate.plan import DENSE, Choice, Plan, rank_steps, read_plan, stored_elements
from eckart.allocate.uniform import uniform

__all__ = [
    "DENSE",
    "Choice",
    "Curve",
    "Plan",
    "allocate",
    "lower_hull",
    "rank_steps",
    "read_plan",
    "stored_elements",
    "uniform",
]
