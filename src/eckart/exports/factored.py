"""The factored folder itself with weights in few bits: for models that were tuned after they were compressed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from eckart.checkpoint.quantize import quantize as quantize_model
from eckart.checkpoint.save import write
from eckart.errors import UsageError
from eckart.exports.base import Exporter, ExportSource
from eckart.exports.card import keep_of_card
from eckart.quantization import require_torchao
from eckart.report.card import render_model_card
from eckart.report.loading import find_loading


class Factored(Exporter):
    """What `eckart compress --quantize` would have published, from a folder in floating point."""

    name: ClassVar[str] = "factored"
    title: ClassVar[str] = "for eckart itself: the factors as they are, in the few bits that --quantize names"
    extra: ClassVar[str] = "quant"
    takes_dense: ClassVar[bool] = True
    keeps_behaviors: ClassVar[bool] = True

    def check(self, source: ExportSource, quantize: str | None) -> None:
        """Refuse to write what is there already."""
        if quantize is None:
            raise UsageError(
                f"{source.folder} is such a folder already. Name the bits (--quantize int8), or copy the folder."
            )
        require_torchao()

    def write(self, source: ExportSource, staging: Path, quantize: str | None) -> Mapping[str, Any]:
        """See :class:`eckart.exports.base.Exporter`."""
        assert quantize is not None
        done = quantize_model(source.model, quantize)
        write(source.model, staging, tokenizer=source.tokenizer, source_folder=source.folder)
        card = render_model_card(
            source.name,
            loading=find_loading(source.model, source.folder),
            summary=f"with weights as factors and in {quantize}",
            records="`eckart/export.json` says how many layers keep their floating-point numbers, and why.",
            **keep_of_card(source.folder, exact=False),
            command=f"eckart export FOLDER --format factored --quantize {quantize} --output-dir {source.name}",
        )
        (staging / "README.md").write_text(card, encoding="utf-8")
        return {
            "quantized_layers": len(done.layers), "left": dict(Counter(done.left.values())), "notes": list(done.notes),
        }  # fmt: skip
