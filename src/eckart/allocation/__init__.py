"""How much of each weight is kept: from a budget, and what each rank is predicted to cost, to a plan.

`uniform` and `shared_uniform` keep the same fraction everywhere; `allocate` spends one budget by predicted loss.
"""

from eckart.allocation.loss import Curve, Option, add, allocate, lower_hull, unite
from eckart.allocation.plan import DENSE, Choice, Plan, stored_elements
from eckart.allocation.plan_file import parse_plan, read_plan
from eckart.allocation.ranks import EXACT, OverBudgetError, RankMultiples, rank_steps, smallest_keep
from eckart.allocation.shared import Bases, largest_shared_rank, shared_uniform
from eckart.allocation.uniform import fitting_choices, uniform

__all__ = [
    "DENSE",
    "EXACT",
    "Bases",
    "Choice",
    "Curve",
    "Option",
    "OverBudgetError",
    "Plan",
    "RankMultiples",
    "add",
    "allocate",
    "fitting_choices",
    "largest_shared_rank",
    "lower_hull",
    "parse_plan",
    "rank_steps",
    "read_plan",
    "shared_uniform",
    "smallest_keep",
    "stored_elements",
    "uniform",
    "unite",
]
