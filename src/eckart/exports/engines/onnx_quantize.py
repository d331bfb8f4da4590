"""Weights of an ONNX graph in few bits, with ONNX Runtime's own tools; tables of embeddings row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eckart.exports.engines.onnx_graph import LARGEST_FILE
from eckart.exports.engines.quiet import quiet

BLOCK = 32
"""Numbers of a column that share a scale, where weights alone are rounded: no more than the smallest ranks."""

ACCURACY = {8: 4, 4: 1}
"""Bits -> what MatMulNBits computes in: 1 for float32, 4 for integers, inputs rounded in the same groups.

Measured on one thread: of one token, 8 bits take 4 times as long in float32 as in integers, and longer than whole
weights; 4 bits take as long either way, and less in float32 for many tokens.
"""


def quantize_file(source: Path, target: Path, kind: str) -> None:
    """Round the weights of a graph's products and its tables.

    Args:
        source: the graph, in float32.
        target: the file to be written.
        kind: "int8-dynamic": MatMulInteger with a scale for each output, inputs rounded while it runs, with a scale for
            each tensor; "int8", "int4": MatMulNBits with a scale for each group of 32, computed as :data:`ACCURACY`
            says.
    """
    import onnx

    model = onnx.load(source)
    split_gemms(model)
    turn_weights(model)
    with quiet():
        model = _dynamic(model) if kind == "int8-dynamic" else _weights(model, 4 if kind == "int4" else 8)
    round_tables(model)
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    onnx.save(model, target, save_as_external_data=size > LARGEST_FILE, location=f"{target.name}_data")


def split_gemms(model: Any) -> None:
    """Write `Gemm` with a stored weight as `MatMul` and `Add`, which the quantizers know; in place."""
    from onnx import helper, numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    made: dict[str, list[Any]] = {}
    for node in model.graph.node:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
        if node.op_type != "Gemm" or not plain or node.input[1] not in stored:
            continue
        weight, out = node.input[1], node.output[0]
        if options.get("transB", 0):
            turned = numpy_helper.to_array(stored[weight]).T.copy()
            weight = f"{out}_weight"
            model.graph.initializer.append(numpy_helper.from_array(turned, weight))
        bias = list(node.input[2:3])
        product = f"{out}_product" if bias else out
        made[out] = [helper.make_node("MatMul", [node.input[0], weight], [product], name=f"{out}_matmul")]
        made[out] += [helper.make_node("Add", [product, *bias], [out])] if bias else []
    _replace_nodes(model, made)
    read = {name for node in model.graph.node for name in node.input}
    for tensor in list(stored.values()):
        if tensor.name not in read:
            model.graph.initializer.remove(tensor)


def turn_weights(model: Any) -> None:
    """Store transposed what products read through a `Transpose`: an output layer that is tied to a table; in place.

    Both are rounded then, the table by its rows and the layer by its outputs, which are the same numbers.
    """
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    made: dict[str, list[Any]] = {}
    for node in model.graph.node:
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        if node.op_type == "Transpose" and node.input[0] in stored and order == [1, 0]:
            weight = numpy_helper.to_array(stored[node.input[0]]).T.copy()
            model.graph.initializer.append(numpy_helper.from_array(weight, node.output[0]))
            made[node.output[0]] = []
    _replace_nodes(model, made)


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

    quantizer = MatMulNBitsQuantizer(
        model, bits=bits, block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY[bits]
    )
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
    made: dict[str, list[Any]] = {}
    for name, tensor in tables.items():
        found = readers.get(name, [])
        if not found or not all(_takes_rows(node) and node.input[0] == name for node in found):
            continue
        table = numpy_helper.to_array(tensor)
        scale = np.maximum(np.abs(table).max(axis=1, keepdims=True) / 127, 1e-30).astype(np.float32)
        rounded = np.clip(np.rint(table / scale), -127, 127).astype(np.int8)
        model.graph.initializer.remove(tensor)
        model.graph.initializer.append(numpy_helper.from_array(rounded, f"{name}_rows"))
        model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}_row_scales"))
        for node in found:
            out = node.output[0]
            made[out] = [
                helper.make_node("Gather", [f"{name}_rows", node.input[1]], [f"{out}_rows"], axis=0),
                helper.make_node("Gather", [f"{name}_row_scales", node.input[1]], [f"{out}_row_scales"], axis=0),
                helper.make_node("Cast", [f"{out}_rows"], [f"{out}_rows_float"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [f"{out}_rows_float", f"{out}_row_scales"], [out]),
            ]
    _replace_nodes(model, made)


def _replace_nodes(model: Any, made: dict[str, list[Any]]) -> None:
    """Put nodes in the place of the one that makes a tensor of this name."""
    nodes = [new for node in model.graph.node for new in made.get(node.output[0], [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _takes_rows(node: Any) -> bool:
    return node.op_type == "Gather" and all(a.name != "axis" or a.i == 0 for a in node.attribute)
