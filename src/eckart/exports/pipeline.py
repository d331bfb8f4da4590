"""`eckart export`: a folder for programs without eckart, published whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from pathlib import Path

from eckart.checkpoint.load import load
from eckart.checkpoint.save import check_savable, stored_bytes
from eckart.checkpoint.source import resolve
from eckart.checkpoint.tokenizer import load_tokenizer
from eckart.errors import UsageError
from eckart.exports.base import ExportSource
from eckart.quantization import check_kind, dequantize, kind_of
from eckart.registry import EXPORTS
from eckart.storage.lock import OutputLock, output_path
from eckart.storage.publish import check_output, publish
from eckart.storage.report_file import finite

logger = logging.getLogger(__name__)


def export(
    folder: str | Path,
    output_dir: str | Path,
    *,
    format: str = "dense",
    quantize: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Publish a model in a form that programs without eckart load.

    Args:
        folder: a folder that eckart published, or its name on the hub.
        output_dir: the folder to be written.
        format: one of :data:`eckart.registry.EXPORTS`.
        quantize: round the weights as well: "int8", "int8-dynamic" or "int4".
        revision: revision of the model on the hub.
        overwrite: replace an output that eckart published earlier.
        trust_remote_code: accept a model that brings its own Python code.

    Returns:
        The published folder.

    Raises:
        CheckpointError: the source cannot be read, or the output not be written.
        ModelError: the format cannot hold this model.
        UsageError: the format is unknown, a library is missing, it knows no such quantization, or the model is
            quantized already.
    """
    exporter = EXPORTS[EXPORTS.check(format)]()
    if quantize is not None:
        check_kind(quantize)
    check_output(output_dir, overwrite=overwrite, inputs=[folder])
    home = resolve(str(folder), revision, trust_remote_code=trust_remote_code)
    check_output(output_dir, overwrite=overwrite, inputs=[home])
    with OutputLock(output_dir) as lock:
        model = load(home, trust_remote_code=trust_remote_code)
        kind = kind_of(model)
        if kind is not None and quantize is not None:
            raise UsageError(
                f"{home} is quantized already ({kind}), and rounding its numbers again would lose more than once. "
                "Export the folder that it was made from with --quantize, or this one without."
            )
        if kind is not None:
            logger.warning("%s is quantized (%s): its rounded numbers are written in floating point", home, kind)
            dequantize(model)
        source = ExportSource(
            model, home, load_tokenizer(home, trust_remote_code=trust_remote_code), trust_remote_code,
            Path(output_dir).name,
        )  # fmt: skip
        exporter.check(source, quantize)
        check_savable(model, home)
        size = stored_bytes(model)
        with publish(
            output_dir, overwrite=overwrite, inputs=[home, model.config.name_or_path], needed_bytes=size, lock=lock
        ) as staging:
            record = {
                "format": format,
                "quantize": quantize,
                "eckart": importlib.metadata.version("eckart"),
                **exporter.write(source, staging, quantize),
            }
            (staging / "eckart").mkdir(exist_ok=True)
            text = json.dumps(finite(record), indent=2, allow_nan=False) + "\n"
            (staging / "eckart" / "export.json").write_text(text, encoding="utf-8")
    return output_path(output_dir)
