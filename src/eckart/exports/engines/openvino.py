"""Graphs for OpenVINO."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from eckart.errors import ModelError
from eckart.exports.base import Exporter, ExportSource
from eckart.exports.engines.card import write_card
from eckart.exports.engines.check import check_source, need
from eckart.exports.engines.compare import Runner, compare
from eckart.exports.engines.folder import place, read_pooling, ready, write_surroundings
from eckart.exports.engines.quiet import quiet
from eckart.exports.engines.trace import FUSED, WAY_OUT, Graph, attention, describe, in_a_line, trace

ENGINE = "OpenVINO"
LIBRARIES = ("openvino", "nncf")
GROUP = 32
"""Numbers of a row that share a scale, in 4 bits and where inputs are rounded."""


class OpenVino(Exporter):
    """`openvino/openvino_model.xml` in a folder as optimum and sentence-transformers read it."""

    name: ClassVar[str] = "openvino"
    title: ClassVar[str] = "a graph for OpenVINO, any batch and length, causal models with keys and values"
    extra: ClassVar[str] = "openvino"
    takes_dense: ClassVar[bool] = True

    def check(self, source: ExportSource, quantize: str | None) -> None:
        """Refuse a missing library, and models that no graph holds."""
        need(LIBRARIES, self.extra, self.name)
        check_source(source)

    def write(self, source: ExportSource, staging: Path, quantize: str | None) -> Mapping[str, Any]:
        """See :class:`eckart.exports.base.Exporter`."""
        import openvino

        half = source.model.dtype != torch.float32
        notes = ready(source, quantize)
        pooling, said = read_pooling(source)
        graph = describe(source.model, source.tokenizer, pooling)
        model = convert(graph)
        compared = compare(graph, load_session(model), ENGINE)
        if quantize is not None:
            model = quantize_model(model, quantize)
            compared = compare(graph, load_session(model), ENGINE, quantized=True)
        file = place(source, staging, "openvino") / "openvino_model.xml"
        openvino.save_model(model, file, compress_to_fp16=half and quantize is None)
        write_surroundings(source, staging)
        write_card(source, staging, self.name, graph, file, quantize)
        return {
            "engine": f"openvino {importlib.metadata.version('openvino')}",
            "inputs": [port.name for port in graph.inputs], "outputs": list(graph.outputs),
            "bytes": sum(path.stat().st_size for path in file.parent.iterdir()), **compared, "notes": [*notes, *said],
        }  # fmt: skip


def convert(graph: Graph) -> Any:
    """A graph as a model of OpenVINO, with its inputs and outputs by name.

    Raises:
        ModelError: it cannot be traced, or it computes what OpenVINO has no operator for.
    """
    import openvino

    with attention(graph.model, FUSED):
        program = trace(graph)
    try:
        with quiet():
            model = openvino.convert_model(program)
    except Exception as error:  # its own, of several kinds
        raise ModelError(
            f"{type(graph.model).__name__} cannot be written for OpenVINO ({in_a_line(error)}). {WAY_OUT}"
        ) from error
    for entry, port in zip(model.inputs, graph.inputs, strict=True):
        entry.get_tensor().set_names({port.name})
        shape = [-1 if isinstance(axis, str) else axis for axis in port.axes]
        entry.get_node().set_partial_shape(openvino.PartialShape(shape))
    for entry, name in zip(model.outputs, graph.outputs, strict=True):
        entry.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    return model


def quantize_model(model: Any, kind: str) -> Any:
    """Round the weights of products and tables with NNCF.

    Args:
        model: of OpenVINO.
        kind: "int8": a scale for each output; "int8-dynamic": the inputs of products too while it runs, a scale for
            each group of 32, which the file asks for; "int4": a scale for each group of 32 weights, and int8 where
            that is NNCF's choice, such as tables of embeddings.

    Returns:
        The model, which is also changed.
    """
    import nncf

    with quiet():
        if kind == "int4":
            model = nncf.compress_weights(
                model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP, ratio=1.0,
                advanced_parameters=nncf.AdvancedCompressionParameters(
                    group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
                ),
            )  # fmt: skip
        else:
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    group = GROUP if kind == "int8-dynamic" else 0
    model.set_rt_info(str(group), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    return model


def load_session(model: Any, threads: int = 1, **options: Any) -> Runner:
    """A graph in OpenVINO on the CPU, computing in float32.

    Args:
        model: of OpenVINO, or the file of one.
        threads: of a run.
        options: of OpenVINO, in place of what is set here; None for its own choice.
    """
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, **options}
    settings = {name: value for name, value in settings.items() if value is not None}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model) if isinstance(model, Path) else model, "CPU", settings)
    request = compiled.create_infer_request()
    names = [output.get_any_name() for output in compiled.outputs]

    def run(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        made = request.infer(dict(batch))
        return {name: made[i].copy() for i, name in enumerate(names)}

    return run
