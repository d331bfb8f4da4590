"""Quantize a model in memory and back, so that `save_pretrained` describes what it then is."""

from __future__ import annotations

from transformers import PreTrainedModel

from eckart import quantization
from eckart.checkpoint.description import attach_config, detach_config, is_special


def quantize(model: PreTrainedModel, kind: str) -> quantization.Quantization:
    """Round the weights of a model to few bits, in place; `save_pretrained` then writes them so.

    The folder loads with `import eckart`. Arguments, what is returned and what is raised are those of
    :func:`eckart.quantization.quantize`.
    """
    done = quantization.quantize(model, kind)
    attach_config(model)
    return done


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Turn quantized layers into ordinary ones that hold the rounded numbers, in place.

    Returns:
        The same model, which can be trained, adapted and made dense.
    """
    quantization.dequantize(model)
    (attach_config if is_special(model) else detach_config)(model)
    return model
