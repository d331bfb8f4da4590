"""The numerical core: tensors in, tensors out. Knows torch and nothing of models."""

from eckart.linalg.decompose import WIDE, checked_eigh, checked_svd, require_finite
from eckart.linalg.kronecker import kronecker_curve_under, kronecker_factorise, rearranged, rearranged_back
from eckart.linalg.embedding import TableFactors, in_blocks, smoothed, table_factors, tied_factors
from eckart.linalg.metric import Metric, weighted_error
from eckart.linalg.pivot import PivotedFactors, pivoted_factors
from eckart.linalg.solve import Factorisation, Problem, curve_under, factorise

__all__ = [
    "WIDE",
    "Factorisation",
    "Metric",
    "PivotedFactors",
    "Problem",
    "TableFactors",
    "checked_eigh",
    "checked_svd",
    "curve_under",
    "factorise",
    "kronecker_curve_under",
    "kronecker_factorise",
    "in_blocks",
    "pivoted_factors",
    "rearranged",
    "rearranged_back",
    "require_finite",
    "smoothed",
    "table_factors",
    "tied_factors",
    "weighted_error",
]
