"""Every factored weight multiplied out: an ordinary checkpoint, which loads without eckart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from eckart.checkpoint.description import detach_config, is_special
from eckart.checkpoint.save import write
from eckart.errors import ModelError
from eckart.exports.base import Exporter, ExportSource
from eckart.model import fuse_experts, to_dense_modules


def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every factored weight of a model by the dense matrix that it stands for, in place.

    Weights that layers share are copied into each of them.

    Args:
        model: a model that :func:`eckart.compress` made or `from_pretrained` loaded.

    Returns:
        The same model with plain Linear and Conv1D modules; `save_pretrained` then writes an ordinary checkpoint
        that needs no eckart.

    Raises:
        ModelError: the model holds no factored weight.
    """
    to_dense_modules(model)
    fuse_experts(model)
    detach_config(model)
    return model


class Dense(Exporter):
    """The checkpoint of the original's class and size, computing what the compressed model computes."""

    name: ClassVar[str] = "dense"
    title: ClassVar[str] = "every factored weight is multiplied out; an ordinary checkpoint, as large as the original"

    def check(self, source: ExportSource, quantize: str | None) -> None:
        """Refuse a model without factors."""
        if not is_special(source.model):
            raise ModelError(
                f"{source.folder} holds no factored weight: it loads without eckart as it is. Copy the folder."
            )

    def write(self, source: ExportSource, staging: Path, quantize: str | None) -> Mapping[str, Any]:
        """See :class:`eckart.exports.base.Exporter`."""
        write(densify(source.model), staging, tokenizer=source.tokenizer, source_folder=source.folder)
        return {}
