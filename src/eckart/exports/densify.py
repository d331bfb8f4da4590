"""Every factored weight multiplied out: an ordinary checkpoint, which loads without eckart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from eckart.checkpoint.description import attach_config, detach_config, is_factored, is_special
from eckart.checkpoint.save import write
from eckart.errors import ModelError
from eckart.exports.base import Exporter, ExportSource
from eckart.exports.card import keep_of_card
from eckart.model import fuse_experts, to_dense_modules
from eckart.quantization import dequantize, quantized_layers, require_torchao
from eckart.report.card import render_model_card
from eckart.report.loading import find_loading


def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every factored weight of a model by the dense matrix that it stands for, in place.

    Weights that layers share are copied into each of them.

    Args:
        model: a model that :func:`eckart.compress` made or `from_pretrained` loaded. One that eckart has quantized
            keeps its rounded numbers, in floating point.

    Returns:
        The same model with plain Linear and Conv1D modules; `save_pretrained` then writes an ordinary checkpoint
        that needs no eckart. What lets the model do less for easy inputs stays: :func:`eckart.adaptive.detach`
        takes it off.

    Raises:
        ModelError: the model holds no factored weight.
    """
    if quantized_layers(model):
        dequantize(model)
        if not is_factored(model):
            _describe(model)
            return model
    to_dense_modules(model)
    fuse_experts(model)
    _describe(model)
    return model


def _describe(model: PreTrainedModel) -> None:
    (attach_config if is_special(model) else detach_config)(model)


class Dense(Exporter):
    """The checkpoint of the original's class and shapes, computing what the compressed model computes."""

    name: ClassVar[str] = "dense"
    title: ClassVar[str] = "every factored weight is multiplied out; an ordinary checkpoint, as large as the original"

    def check(self, source: ExportSource, quantize: str | None) -> None:
        """Refuse a model without factors, unless it is to be quantized."""
        if quantize is not None:
            require_torchao()
        elif not is_special(source.model) and not source.made_whole:
            raise ModelError(
                f"{source.folder} holds no factored weight: it loads without eckart as it is. Copy the folder."
            )

    def write(self, source: ExportSource, staging: Path, quantize: str | None) -> Mapping[str, Any]:
        """See :class:`eckart.exports.base.Exporter`."""
        model = densify(source.model) if is_special(source.model) else source.model
        if quantize is None:
            write(model, staging, tokenizer=source.tokenizer, source_folder=source.folder)
            self._write_card(
                source, model, staging, summary="made smaller with eckart, every weight multiplied out again"
            )
            return {}
        from eckart.exports.torchao import write_quantized

        record = write_quantized(model, staging, quantize, tokenizer=source.tokenizer, source_folder=source.folder)
        self._write_card(
            source, model, staging, quantize,
            summary=f"with weights in {quantize} by torchao",
            notice="It is an ordinary checkpoint of transformers, and loads without eckart: `pip install torchao`.",
            records="`eckart/export.json` says which layers keep their floating-point numbers, and why.",
        )  # fmt: skip
        return record

    @staticmethod
    def _write_card(
        source: ExportSource, model: PreTrainedModel, staging: Path, quantize: str | None = None, **more: Any
    ) -> None:
        rounded = f" --quantize {quantize}" if quantize else ""
        settings = {
            "records": "`eckart/export.json` says what was exported.",
            **keep_of_card(source.folder, exact=quantize is None),
            **more,
        }
        card = render_model_card(
            source.name,
            loading=find_loading(model, source.folder, needs_eckart=False),
            command=f"eckart export FOLDER --format dense{rounded} --output-dir {source.name}",
            **settings,
        )
        (staging / "README.md").write_text(card, encoding="utf-8")
