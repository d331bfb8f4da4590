"""An ONNX graph of a traced model, with what makes ONNX Runtime slow taken out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from eckart.errors import ModelError
from eckart.exports.engines.quiet import quiet
from eckart.exports.engines.trace import WAY_OUT, Graph, attention, in_a_line, trace

LARGEST_FILE = 1_500_000_000
"""Bytes of weights up to which they are in the graph's own file: protobuf holds two gigabytes."""


def write_graph(graph: Graph, file: Path) -> None:
    """Trace a model and write it as ONNX.

    Raises:
        ModelError: it cannot be traced, or it computes what ONNX has no operator for.
    """
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with attention(graph.model, "eager"):
        program = trace(graph)
    with quiet():
        try:
            made: Any = torch.onnx.export(
                program, dynamo=True, optimize=True, verbose=False, output_names=list(graph.outputs),
                input_names=[port.name for port in graph.inputs],
            )  # fmt: skip
        except Exception as error:  # the exporter's own, and those of what it calls
            raise ModelError(
                f"{type(graph.model).__name__} cannot be written as ONNX ({in_a_line(error)}). {WAY_OUT}"
            ) from error
    model = made.model
    ClearMetadataAndDocStringPass()(model)  # lines and paths of this machine's Python files
    name_axes(model, graph)
    keep_sums_apart(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    onnx_ir.save(model, file, external_data=f"{file.name}_data" if size > LARGEST_FILE else None)


def name_axes(model: Any, graph: Graph) -> None:
    """Call the open axes by their names, in inputs and outputs."""
    import onnx_ir

    names: dict[str, str] = {}
    for value, port in zip(model.graph.inputs, graph.inputs, strict=True):
        for size, axis in zip(value.shape, port.axes, strict=True):
            if isinstance(axis, str):
                names.setdefault(str(size), axis)
        value.shape = onnx_ir.Shape(port.axes)

    def named(size: Any) -> Any:
        return size if isinstance(size, int) else re.sub(r"\w+", lambda found: names.get(found[0], found[0]), str(size))

    for value in model.graph.outputs:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([named(size) for size in value.shape])


def keep_sums_apart(model: Any) -> None:
    """Write the sum that a layer norm reads as `Sum` instead of `Add`, which is the same.

    ONNX Runtime fuses `Add` and `LayerNormalization` into one operator whose CPU kernel takes several times as long as
    both: without it all-MiniLM-L6-v2 in int8 runs 1.3 times as fast (1.32.0, one thread).
    """
    for node in model.graph:
        if node.op_type == "LayerNormalization":
            source = node.inputs[0].producer()
            if source is not None and source.op_type == "Add":
                source.op_type = "Sum"
