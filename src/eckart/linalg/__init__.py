"""The numerical core: tensors in, tensors out. Knows torch and nothing of models."""

from eckart.linalg.balance import balance_for_rounding, balanced, flat_rotation
from eckart.linalg.block_metric import BlockMetric, stack_metrics
from eckart.linalg.decompose import WIDE, checked_eigh, checked_svd, require_finite
from eckart.linalg.embedding import TableFactors, in_blocks, smoothed, table_factors, tied_factors
from eckart.linalg.joint import factorize_jointly, factorize_stacked, group_curve_under, split_rows, stack_problems
from eckart.linalg.kronecker import kronecker_curve_under, kronecker_factorize, rearranged, rearranged_back
from eckart.linalg.metric import Metric, weighted_error
from eckart.linalg.pivot import PivotedFactors, pivoted_factors
from eckart.linalg.shared_basis import shared_basis
from eckart.linalg.slice import Slicing, slice_by_leverage, slice_in_order, slice_neurons, slicing_curve_under
from eckart.linalg.solve import Factorization, Problem, curve_under, factorize
from eckart.linalg.sparse import (
    Split,
    averaged_importance,
    cubic_fraction,
    low_rank_sparse_split,
    rows_above,
    smallest_masked,
)
from eckart.linalg.tokens import (
    bent,
    count_kept,
    keep_above,
    keep_most,
    pick,
    raised,
    reach,
    relative,
    retained_fractions,
    significance,
    soft_extract,
    soft_keep,
)
from eckart.linalg.value_heads import NarrowedHeads, narrow_heads

__all__ = [
    "WIDE",
    "BlockMetric",
    "Factorization",
    "Metric",
    "NarrowedHeads",
    "PivotedFactors",
    "Problem",
    "Slicing",
    "Split",
    "TableFactors",
    "averaged_importance",
    "balance_for_rounding",
    "balanced",
    "bent",
    "checked_eigh",
    "checked_svd",
    "count_kept",
    "cubic_fraction",
    "curve_under",
    "factorize",
    "factorize_jointly",
    "factorize_stacked",
    "flat_rotation",
    "group_curve_under",
    "in_blocks",
    "keep_above",
    "keep_most",
    "kronecker_curve_under",
    "kronecker_factorize",
    "low_rank_sparse_split",
    "narrow_heads",
    "pick",
    "pivoted_factors",
    "raised",
    "reach",
    "rearranged",
    "rearranged_back",
    "relative",
    "require_finite",
    "retained_fractions",
    "rows_above",
    "shared_basis",
    "significance",
    "slice_by_leverage",
    "slice_in_order",
    "slice_neurons",
    "slicing_curve_under",
    "smallest_masked",
    "smoothed",
    "soft_extract",
    "soft_keep",
    "split_rows",
    "stack_metrics",
    "stack_problems",
    "table_factors",
    "tied_factors",
    "weighted_error",
]
