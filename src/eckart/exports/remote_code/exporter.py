"""`--format remote-code`: transformers' own class, with the factors put in place by a Python file in the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from eckart.checkpoint.description import is_special
from eckart.checkpoint.save import write_companions
from eckart.errors import ModelError
from eckart.exports.base import Exporter, ExportSource
from eckart.exports.remote_code.card import write_card
from eckart.exports.remote_code.compare import compare
from eckart.exports.remote_code.folder import write_model
from eckart.exports.remote_code.write_text import names_of
from eckart.quantization import require_torchao
from eckart.storage.layout import model_folder


class RemoteCode(Exporter):
    """A folder that vLLM, lm_eval and stock transformers load with `trust_remote_code=True`."""

    name: ClassVar[str] = "remote-code"
    title: ClassVar[str] = "the factors as they are, with a Python file: for vLLM, and for transformers without eckart"

    def check(self, source: ExportSource, quantize: str | None) -> None:
        """Refuse what no file can be generated for."""
        if quantize is not None:
            require_torchao()
        if not is_special(source.model):
            raise ModelError(
                f"{source.folder} holds nothing that its class does not build: it loads without eckart as it is, in "
                "vLLM too. Copy the folder."
            )
        names_of(source.model)

    def write(self, source: ExportSource, staging: Path, quantize: str | None) -> Mapping[str, Any]:
        """See :class:`eckart.exports.base.Exporter`."""
        home = staging / model_folder(source.folder).relative_to(source.folder)
        home.mkdir(parents=True, exist_ok=True)
        written = write_model(source.model, home, quantize)
        write_companions(staging, tokenizer=source.tokenizer, source_folder=source.folder)
        rounded = written.rounded
        if rounded is None:
            record = compare(source.model, home, written.auto_classes)
        else:  # transformers reads what torchao has rounded in the class that was saved alone, not in its base model
            record = {**compare(rounded.model, home, written.auto_classes[:1]), **rounded.record}
        write_card(source, staging, written, quantize)
        return {**record, "class": written.names.exported, "splits": written.parallel.refusal or "as any model"}
