"""`eckart export`: a folder for programs without eckart, published whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from pathlib import Path

from transformers import PreTrainedModel

from eckart.adaptive import behaviors_of, detach
from eckart.checkpoint.load import load
from eckart.checkpoint.save import check_savable, stored_bytes
from eckart.checkpoint.source import resolve
from eckart.checkpoint.tokenizer import load_tokenizer
from eckart.errors import ModelError, UsageError
from eckart.exports.base import Exporter, ExportSource
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
    drop_adaptive: bool = False,
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
        drop_adaptive: leave out what lets the model do less for easy inputs, and export the whole of it: early exits
            and token skipping are decisions on numbers, which only the format "factored" holds.
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
        made_whole = _make_whole(model, exporter, home, drop=drop_adaptive)
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
            Path(output_dir).name, made_whole,
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


def _make_whole(model: PreTrainedModel, exporter: Exporter, home: Path, *, drop: bool) -> bool:
    """Take off what lets a model do less for easy inputs, where that is asked for; returns whether it was there.

    Raises:
        ModelError: the format cannot hold it, and nobody has asked to leave it out.
    """
    found = behaviors_of(model)
    if not found or (exporter.keeps_behaviors and not drop):
        return False
    if not drop:
        raise ModelError(
            f"{home} has {' and '.join(found)}, which format {exporter.name} cannot hold: rows or tokens leave the "
            "batch as their numbers say. Load it with eckart, or export the whole model without it: --drop-adaptive"
        )
    detach(model)
    return True
