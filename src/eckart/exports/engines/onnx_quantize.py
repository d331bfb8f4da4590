"""Weights of an ONNX graph in few bits, with ONNX Runtime's own tools; tables of embeddings row by row."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eckart.exports.engines.onnx_graph import LARGEST_FILE

BLOCK = 32
"""Numbers of a column that share a scale, where weights alone are rounded: no more than the smallest ranks."""


def quantize_file(source: Path, target: Path, kind: str) -> None:
    """Round the weights of a graph's products and its tables.

    Args:
        source: the graph, in float32.
        target: the file to be written.
        kind: "int8-dynamic": MatMulInteger with a scale for each output, inputs rounded while it runs; "int8", "int4":
            MatMulNBits with a scale for each group of 32, computed in float32.
    """
    import onnx

    model = onnx.load(source)
    with _quiet():
        model = _dynamic(model) if kind == "int8-dynamic" else _weights(model, 4 if kind == "int4" else 8)
    round_tables(model)
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    onnx.save(model, target, save_as_external_data=size > LARGEST_FILE, location=f"{target.name}_data")


def _dynamic(model: Any) -> Any:
    import tempfile

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    with tempfile.TemporaryDirectory(prefix="eckart-") as scratch:
        target = Path(scratch) / "model.onnx"
        quantize_dynamic(
            model, target, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"], per_channel=True,
            use_external_data_format=size > LARGEST_FILE, extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
        return onnx.load(target)


def _weights(model: Any, bits: int) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=BLOCK, is_symmetric=True, accuracy_level=1)
    quantizer.process()
    return quantizer.model.model


def round_tables(model: Any) -> None:
    """Store what `Gather` takes rows of in 8 bits, with a scale for each row: `y = scale[i] q[i]`; in place.

    A table that something else reads too stays as it is.
    """
    from onnx import TensorProto, helper, numpy_helper

    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    tables = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and min(tensor.dims) > 1
    }
    made: dict[int, list[Any]] = {}
    for name, tensor in tables.items():
        found = readers.get(name, [])
        if not found or not all(_takes_rows(node) and node.input[0] == name for node in found):
            continue
        table = numpy_helper.to_array(tensor)
        scale = np.maximum(np.abs(table).max(axis=1, keepdims=True) / 127, 1e-30).astype(np.float32)
        rounded = np.clip(np.rint(table / scale), -127, 127).astype(np.int8)
        model.graph.initializer.remove(tensor)
        model.graph.initializer.append(numpy_helper.from_array(rounded, f"{name}_rounded"))
        model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
        for node in found:
            out = node.output[0]
            made[id(node)] = [
                helper.make_node("Gather", [f"{name}_rounded", node.input[1]], [f"{out}_rounded"], axis=0),
                helper.make_node("Gather", [f"{name}_scale", node.input[1]], [f"{out}_scale"], axis=0),
                helper.make_node("Cast", [f"{out}_rounded"], [f"{out}_cast"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [f"{out}_cast", f"{out}_scale"], [out]),
            ]
    nodes = [new for node in model.graph.node for new in made.get(id(node), [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _takes_rows(node: Any) -> bool:
    return node.op_type == "Gather" and all(a.name != "axis" or a.i == 0 for a in node.attribute)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without advice that does not apply: the graph is optimized already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
