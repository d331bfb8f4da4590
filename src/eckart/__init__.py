"""eckart makes pretrained transformers smaller and faster by factoring their weight matrices.

Importing it registers the checkpoint format with transformers, so that `from_pretrained` loads what
:func:`compress` saved.
"""

from eckart.checkpoint.description import detach_config as _unmark
from eckart.checkpoint.load import load
from eckart.checkpoint.plugin import register as _register
from eckart.compression.checkpoint import compress_checkpoint
from eckart.compression.pipeline import compare, compress
from eckart.compression.recipe import Recipe
from eckart.compression.result import Result
from eckart.errors import EckartError
from eckart.evaluation.evaluation import evaluate
from eckart.model import fuse_experts as _fuse
from eckart.model import to_dense_modules as _to_dense_modules
from eckart.recovery.pipeline import tune
from eckart.recovery.recipe import TuneRecipe
from eckart.recovery.result import TuneResult

__version__ = "0.1.0"
__all__ = [
    "EckartError",
    "Recipe",
    "Result",
    "TuneRecipe",
    "TuneResult",
    "compare",
    "compress",
    "compress_checkpoint",
    "densify",
    "evaluate",
    "load",
    "tune",
]

_register()


def densify(model):  # type: ignore[no-untyped-def]
    """Replace every factored weight by the dense one that it stands for, in place; what layers share, each gets.

    Args:
        model: a model that :func:`compress` made or `from_pretrained` loaded.

    Returns:
        The same model with plain Linear and Conv1D modules; `save_pretrained` then writes an ordinary
        checkpoint that needs no eckart.

    Raises:
        EckartError: if the model holds no factored weight.
    """
    _to_dense_modules(model)
    _fuse(model)
    _unmark(model)
    return model
