"""Weights in few bits, of factors and of what stayed dense: what survives rounding, and the rounding itself."""

from eckart.quantization.kinds import KINDS, check_kind
from eckart.quantization.prepare import prepare
from eckart.quantization.quantize import (
    Quantization,
    choose_layers,
    dequantize,
    kind_of,
    quantize,
    quantized_layers,
    refuse_quantized,
    require_torchao,
)

__all__ = [
    "KINDS",
    "Quantization",
    "check_kind",
    "choose_layers",
    "dequantize",
    "kind_of",
    "prepare",
    "quantize",
    "quantized_layers",
    "refuse_quantized",
    "require_torchao",
]
