"""Graphs for ONNX Runtime."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from eckart.exports.base import Exporter, ExportSource
from eckart.exports.engines.card import write_card
from eckart.exports.engines.check import check_source, need
from eckart.exports.engines.compare import Runner, compare
from eckart.exports.engines.folder import place, read_pooling, ready, write_surroundings
from eckart.exports.engines.trace import describe

ENGINE = "ONNX Runtime"
LIBRARIES = ("onnx", "onnxruntime", "onnxscript")


class Onnx(Exporter):
    """`onnx/model.onnx` in a folder as optimum, sentence-transformers and transformers.js read it."""

    name: ClassVar[str] = "onnx"
    title: ClassVar[str] = "a graph for ONNX Runtime, any batch and length, causal models with keys and values"
    extra: ClassVar[str] = "onnx"
    takes_dense: ClassVar[bool] = True

    def check(self, source: ExportSource, quantize: str | None) -> None:
        """Refuse a missing library, and models that no graph holds."""
        need(LIBRARIES, self.extra, self.name)
        check_source(source)

    def write(self, source: ExportSource, staging: Path, quantize: str | None) -> Mapping[str, Any]:
        """See :class:`eckart.exports.base.Exporter`."""
        from eckart.exports.engines.onnx_graph import write_graph
        from eckart.exports.engines.onnx_quantize import quantize_file

        notes = ready(source, quantize)
        pooling, said = read_pooling(source)
        graph = describe(source.model, source.tokenizer, pooling)
        home = place(source, staging, "onnx")
        file = home / "model.onnx"
        with tempfile.TemporaryDirectory(prefix="eckart-") as scratch:
            whole = file if quantize is None else Path(scratch) / file.name
            write_graph(graph, whole)
            compared = compare(graph, load_session(whole), ENGINE)
            if quantize is not None:
                quantize_file(whole, file, quantize)
                compared = compare(graph, load_session(file), ENGINE, quantized=True)
        write_surroundings(source, staging)
        write_card(source, staging, self.name, graph, file, quantize)
        return {
            "engine": f"onnxruntime {importlib.metadata.version('onnxruntime')}",
            "inputs": [port.name for port in graph.inputs], "outputs": list(graph.outputs),
            "bytes": sum(path.stat().st_size for path in home.iterdir()), **compared, "notes": [*notes, *said],
        }  # fmt: skip


def load_session(file: Path, threads: int = 1) -> Runner:
    """A graph in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return dict(zip(names, session.run(names, dict(batch)), strict=True))

    return run
