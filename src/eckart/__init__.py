"""eckart makes pretrained transformers smaller and faster by factoring their weight matrices.

Importing it imports neither torch nor transformers. It lets `from_pretrained` load what :func:`compress` saved, as soon
as transformers is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from eckart.checkpoint.register import register_when_imported
from eckart.errors import EckartError
from eckart.lookup.version import VERSION

if TYPE_CHECKING:
    from eckart.adaptive.early_exit import set_early_exit
    from eckart.allocation import Choice, Plan
    from eckart.checkpoint.load import load
    from eckart.checkpoint.push import push_folder
    from eckart.checkpoint.quantize import dequantize, quantize
    from eckart.compression.compare import Comparison, compare
    from eckart.compression.narrow_values import NarrowedModel, narrow_value_heads
    from eckart.compression.pipeline import compress
    from eckart.compression.recipe import Recipe
    from eckart.compression.result import Result
    from eckart.evaluation.inspection import inspect
    from eckart.evaluation.pipeline import evaluate
    from eckart.evaluation.recipe import EvaluationRecipe, InspectionRecipe
    from eckart.exports.densify import densify
    from eckart.exports.pipeline import export
    from eckart.forms import register_form
    from eckart.forms.base import Factored
    from eckart.forms.linear import FactoredLinear
    from eckart.linalg.metric import Metric
    from eckart.linalg.solve import Problem
    from eckart.methods.base import Method
    from eckart.recovery.base import ClosedFormRecovery, Recovery
    from eckart.recovery.pipeline import tune
    from eckart.recovery.recipe import TuneRecipe
    from eckart.recovery.result import TuneResult
    from eckart.registry import register_method, register_recovery
    from eckart.speed.bench import bench
    from eckart.speed.recipe import BenchRecipe

register_when_imported()

__version__ = VERSION

_PLACES = {
    # What there is to do with a model.
    "compress": "compression.pipeline:compress",
    "compare": "compression.compare:compare",
    "evaluate": "evaluation.pipeline:evaluate",
    "tune": "recovery.pipeline:tune",
    "inspect": "evaluation.inspection:inspect",
    "bench": "speed.bench:bench",
    "quantize": "checkpoint.quantize:quantize",
    "narrow_value_heads": "compression.narrow_values:narrow_value_heads",
    "load": "checkpoint.load:load",
    "densify": "exports.densify:densify",
    "dequantize": "checkpoint.quantize:dequantize",
    "set_early_exit": "adaptive.early_exit:set_early_exit",
    "export": "exports.pipeline:export",
    "push_folder": "checkpoint.push:push_folder",
    # What goes in, and what comes out.
    "Recipe": "compression.recipe:Recipe",
    "EvaluationRecipe": "evaluation.recipe:EvaluationRecipe",
    "InspectionRecipe": "evaluation.recipe:InspectionRecipe",
    "BenchRecipe": "speed.recipe:BenchRecipe",
    "TuneRecipe": "recovery.recipe:TuneRecipe",
    "Comparison": "compression.compare:Comparison",
    "Result": "compression.result:Result",
    "TuneResult": "recovery.result:TuneResult",
    "NarrowedModel": "compression.narrow_values:NarrowedModel",
    "Plan": "allocation:Plan",
    "Choice": "allocation:Choice",
    # What methods, forms and recoveries are made of (docs/architecture.md shows how).
    "Method": "methods.base:Method",
    "Metric": "linalg:Metric",
    "Problem": "linalg:Problem",
    "Factored": "forms.base:Factored",
    "FactoredLinear": "forms.linear:FactoredLinear",
    "Recovery": "recovery.base:Recovery",
    "ClosedFormRecovery": "recovery.base:ClosedFormRecovery",
    "register_method": "registry:register_method",
    "register_form": "forms:register_form",
    "register_recovery": "registry:register_recovery",
}
"""Public name -> module:attribute, imported when it is first used."""

__all__ = [
    "BenchRecipe",
    "Choice",
    "ClosedFormRecovery",
    "Comparison",
    "EckartError",
    "EvaluationRecipe",
    "Factored",
    "FactoredLinear",
    "InspectionRecipe",
    "Method",
    "Metric",
    "NarrowedModel",
    "Plan",
    "Problem",
    "Recipe",
    "Recovery",
    "Result",
    "TuneRecipe",
    "TuneResult",
    "bench",
    "compare",
    "compress",
    "densify",
    "dequantize",
    "evaluate",
    "export",
    "inspect",
    "load",
    "narrow_value_heads",
    "push_folder",
    "quantize",
    "register_form",
    "register_method",
    "register_recovery",
    "set_early_exit",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'eckart' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    value = getattr(importlib.import_module(f"eckart.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
