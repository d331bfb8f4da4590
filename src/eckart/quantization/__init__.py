"""Weights in few bits, of factors and of what stayed dense: what survives rounding, and the rounding itself."""

from eckart.quantization.kinds import KINDS, check_kind
from eckart.quantization.prepare import prepare

__all__ = ["KINDS", "check_kind", "prepare"]
