"""ONNX: what ONNX Runtime computes of an exported folder is what the checkpoint computes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import BY_NAME
from engine_folders import causal_folder, embeddings, expected_tokens, generate, prompts, reader, sentence_folder
from transformers import AutoConfig, AutoTokenizer

from eckart.errors import CheckpointError, ModelError, UsageError
from eckart.exports.engines import check, ports
from eckart.exports.engines import onnx as exporter
from eckart.exports.engines.compare import compare, real_places, relative_difference
from eckart.exports.engines.ports import Shape
from eckart.exports.engines.trace import _asked_bounds, describe, trace
from eckart.exports.pipeline import export

onnx = pytest.importorskip("onnx", reason="pip install 'eckart[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'eckart[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'eckart[onnx]'")

from eckart.exports.engines import onnx_graph, onnx_quantize

CLOSE = 1e-5  # of the norm


def session(file: Path) -> Any:
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def operators(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file).graph.node)


@pytest.fixture(scope="module")
def sentence(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sentence")
    source = sentence_folder(folder / "source")
    return source, export(source, folder / "out", format="onnx")


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("causal")
    source = causal_folder(folder / "source")
    return source, export(source, folder / "out", format="onnx")


# -- a sentence encoder ------------------------------------------------------------------------------


def test_embeddings_are_those_of_the_checkpoint(sentence):
    source, out = sentence
    batch, hidden, pooled = embeddings(source)
    found = session(out / "onnx" / "model.onnx")
    assert [entry.name for entry in found.get_inputs()] == ["input_ids", "attention_mask"]
    for name, wanted in (("last_hidden_state", hidden), ("sentence_embedding", pooled)):
        (made,) = found.run([name], batch)
        real = batch["attention_mask"].astype(bool) if made.ndim == 3 else slice(None)
        assert apart(made[real], wanted[real]) < CLOSE


def test_axes_have_names(sentence):
    found = session(sentence[1] / "onnx" / "model.onnx")
    assert all(entry.shape == ["batch", "length"] for entry in found.get_inputs())
    assert [entry.shape for entry in found.get_outputs()] == [["batch", "length", 32], ["batch", 16]]


def test_folder_is_laid_out_for_its_readers(sentence):
    source, out = sentence
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"onnx/model.onnx", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "README.md",
            "config.json", "tokenizer.json", "eckart/export.json"} <= written  # fmt: skip
    assert not any(name.endswith(".safetensors") and "/" not in name for name in written)
    assert (out / "modules.json").read_bytes() == (source / "modules.json").read_bytes()
    assert getattr(AutoConfig.from_pretrained(out), "quantization_config", None) is None
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"] == reader()("a b")["input_ids"]
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    card = (out / "README.md").read_text()
    assert 'SentenceTransformer("out", backend="onnx")' in card
    assert "eckart" not in card[card.index("```python") : card.rindex("```")]


def test_record_says_what_was_compared(sentence):
    record = json.loads((sentence[1] / "eckart" / "export.json").read_text())
    assert record["format"] == "onnx"
    assert set(record["largest_relative_difference"]) == {"last_hidden_state", "sentence_embedding"}
    assert 0 < max(record["largest_relative_difference"].values()) < CLOSE
    assert record["tried"] == ["1 x 1", "1 x 5", "3 x 11", "3 x 4"]
    assert any("form pivoted are now lowrank" in note for note in record["notes"])


def test_products_that_are_shared_are_computed_once(sentence):
    """3 + 1 of the joint group, 2 of either two-factor weight, 1 of the dense output, 2 of attention, 1 of Dense."""
    found = operators(sentence[1] / "onnx" / "model.onnx")
    assert found["MatMul"] + found["Gemm"] == 4 + 2 + 2 + 1 + 2 + 1
    assert found["Sum"] == 3  # before each layer norm


def test_no_path_of_this_machine_is_written(sentence):
    written = (sentence[1] / "onnx" / "model.onnx").read_bytes()
    assert b"site-packages" not in written
    assert str(Path(onnx_graph.__file__).parents[4]).encode() not in written


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4"])
def test_quantized_folder(kind, sentence, tmp_path, monkeypatch):
    source, out = sentence
    monkeypatch.setattr(onnx_graph, "write_graph", lambda _, file: shutil.copyfile(out / "onnx" / "model.onnx", file))
    made = export(source, tmp_path / kind, format="onnx", quantize=kind)
    record = json.loads((made / "eckart" / "export.json").read_text())
    assert record["quantize"] == kind
    assert 1e-3 < record["largest_relative_difference"]["sentence_embedding"] < (0.3 if kind == "int4" else 0.05)
    file = made / "onnx" / "model.onnx"
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    assert file.stat().st_size < 0.35 * (out / "onnx" / "model.onnx").stat().st_size
    assert record["bytes"] == file.stat().st_size
    found = operators(file)
    assert found["MatMulInteger" if kind == "int8-dynamic" else "MatMulNBits"] == 4 + 2 + 2 + 1 + 1
    assert found["MatMul"] == 2  # attention has no weights
    bits = {a.i for node in onnx.load(file).graph.node for a in node.attribute if a.name == "bits"}
    assert bits == {"int8": {8}, "int8-dynamic": set(), "int4": {4}}[kind]


def test_what_computes_something_else_is_not_published(sentence, tmp_path, monkeypatch):
    source, out = sentence
    load = exporter.load_session

    def wrong(file):
        run = load(file)
        return lambda batch: {name: value * 1.001 for name, value in run(batch).items()}

    monkeypatch.setattr(onnx_graph, "write_graph", lambda _, file: shutil.copyfile(out / "onnx" / "model.onnx", file))
    monkeypatch.setattr(exporter, "load_session", wrong)
    with pytest.raises(CheckpointError, match=r"last_hidden_state by 0\.001 of its norm"):
        export(source, tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


# -- a causal model ----------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_transformers(causal):
    source, out = causal
    found = session(out / "onnx" / "model.onnx")
    names = [output.name for output in found.get_outputs()]
    shapes = {e.name: (e.shape[1], e.shape[3]) for e in found.get_inputs() if e.name.startswith("past_key_values.")}
    assert shapes == {"past_key_values.0.key": (2, 8), "past_key_values.0.value": (2, 8)}
    ids, mask = (tensor.numpy() for tensor in prompts())
    made = generate(lambda batch: dict(zip(names, found.run(None, dict(batch)), strict=True)), shapes, ids, mask, 8)
    assert len(np.unique(made)) > 3
    np.testing.assert_array_equal(made, expected_tokens(source, 8))


def test_record_of_a_causal_model(causal):
    record = json.loads((causal[1] / "eckart" / "export.json").read_text())
    assert set(record["largest_relative_difference"]) == {"logits", "keys and values"}
    assert "3 x 1 after 8" in record["tried"]
    assert "stored as bfloat16, written as float32" in record["notes"]
    assert (causal[1] / "generation_config.json").is_file()


# -- what is refused -----------------------------------------------------------------------------------


def test_encoder_decoder_is_refused():
    with pytest.raises(ModelError, match="is an encoder-decoder, which no graph is written for"):
        describe(BY_NAME["t5"].model(), None)


@pytest.mark.parametrize(
    ("compute", "reason"),
    [(lambda ids: ids[:, : len(ids)], "batch = 2"), (lambda ids: ids if ids.sum() > 3 else -ids, ".*data-dependent")],
)
def test_model_that_cannot_be_traced_with_open_sizes_is_refused(compute, reason):
    class Fixed(torch.nn.Module):
        def forward(self, *tensors):
            return (compute(tensors[0]),)

    graph = describe(BY_NAME["bert-classes"].model(), None)
    with pytest.raises(ModelError, match=rf"BertForSequenceClassification cannot be traced with open sizes \({reason}"):
        trace(replace(graph, function=Fixed()))


def test_missing_library_is_named(sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UsageError, match=r"needs onnxscript, which is not installed: pip install 'eckart\[onnx\]'"):
        export(sentence[0], tmp_path / "out", format="onnx")


# -- parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        ("bert-classes", ["input_ids", "attention_mask", "token_type_ids"], ("logits",)),
        ("modernbert", ["input_ids", "attention_mask"], ("logits",)),
        ("bert", ["input_ids", "attention_mask", "token_type_ids"], ("last_hidden_state", "pooler_output")),
        ("vit", ["pixel_values"], ("logits",)),
    ],
)
def test_inputs_and_outputs(name, inputs, outputs):
    graph = describe(BY_NAME[name].model(), None)
    assert [port.name for port in graph.inputs] == inputs
    assert graph.outputs == outputs
    assert not graph.causal


def test_answers_to_questions_are_two_outputs():
    import transformers

    config = BY_NAME["bert"].model().config
    assert describe(transformers.BertForQuestionAnswering(config).eval(), None).outputs == (
        "start_logits",
        "end_logits",
    )


def test_batches_are_padded_where_models_pad():
    graph = describe(BY_NAME["roberta"].model(), None)
    batch = graph.batch(Shape(3, 6, padding=2))
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 6, [1, 1, 1, 1, 0, 0]]
    padding = graph.model.config.pad_token_id
    assert torch.equal(batch["input_ids"] == padding, batch["attention_mask"] == 0)
    causal = describe(BY_NAME["llama"].model(), None)
    batch = causal.batch(Shape(2, 3, past=2, padding=3))
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[2, 3, 4], [0, 0, 1]]
    assert batch["past_key_values.1.value"].shape == (2, 2, 2, 8)


def test_shapes_beyond_the_positions_are_not_tried():
    model = BY_NAME["bert"].model(max_position_embeddings=8)
    assert {shape.length for shape in ports.fitting(ports.TRIED, model)} == {1, 4, 5}


def test_padding_is_not_compared():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    hidden, keys = torch.randn(2, 2, 5), torch.randn(2, 4, 3, 5)
    assert real_places(hidden, mask, 2).tolist() == [[True, True], [False, False]]
    assert real_places(keys, mask, 2)[:, 3].tolist() == [[True, True, True], [True, False, False]]
    assert real_places(torch.randn(2, 7), mask, 2) is None
    changed = hidden.clone()
    changed[1] = torch.nan
    assert relative_difference(changed, hidden, real_places(hidden, mask, 2)) == 0
    assert relative_difference(changed, hidden) == float("inf")
    assert relative_difference(hidden[:1], hidden) == float("inf")


def test_what_stands_in_padding_does_not_count():
    graph = describe(BY_NAME["bert-mlm"].model(), None)

    def run(batch, spoiled=0):
        made = graph.run({name: torch.from_numpy(value) for name, value in batch.items()})["logits"].numpy()
        made[batch["attention_mask"] == spoiled] += 1
        return {"logits": made}

    assert compare(graph, run, "an engine")["largest_relative_difference"]["logits"] == 0
    with pytest.raises(CheckpointError, match=r"logits by .* for 1 texts of 1 tokens after 0 \(allowed: 0\.0001\)"):
        compare(graph, lambda batch: run(batch, 1), "an engine")


def test_rounding_that_leaves_nothing_is_refused():
    graph = describe(BY_NAME["bert-classes"].model(), None)

    def run(batch):
        return {
            "logits": -graph.run({name: torch.from_numpy(value) for name, value in batch.items()})["logits"].numpy()
        }

    with pytest.raises(CheckpointError, match=r"rounding the weights changes logits by 2 of its norm.*Leave out"):
        compare(graph, run, "an engine", quantized=True)


def test_bounds_that_the_tracer_asks_for():
    said = "Violated\nSuggested fixes:\n  length = Dim('length', max=40)\n  total = Dim('total', min=4)\n\nMore"
    bounds, others = _asked_bounds(said)
    assert (bounds["length"].max, bounds["total"].min, others) == (40, 4, [])
    assert _asked_bounds("Suggested fixes:\n  batch = 2\n") == ({}, ["batch = 2"])


def test_gemms_are_split_for_the_quantizers():
    from onnx import TensorProto, helper, numpy_helper

    weight, bias = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32), np.ones(3, np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1), helper.make_node("Gemm", ["x", "v"], ["z"])],
        "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "yz"],
        [numpy_helper.from_array(array, name) for name, array in (("w", weight), ("b", bias), ("v", weight.T))],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx_quantize.split_gemms(model)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add", "MatMul"]
    x = np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)
    y, z = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(y, x @ weight.T + 1, rtol=1e-5)
    np.testing.assert_allclose(z, x @ weight.T, rtol=1e-5)


def test_an_output_layer_that_is_tied_to_a_table_is_rounded_too(tmp_path):
    from onnx import TensorProto, helper, numpy_helper

    table = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["t", "i"], ["h"]), helper.make_node("Transpose", ["t"], ["u"], perm=[1, 0]),
         helper.make_node("MatMul", ["h", "u"], ["y"], name="head")],
        "g", [helper.make_tensor_value_info("i", TensorProto.INT64, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 64])], [numpy_helper.from_array(table, "t")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "whole.onnx")
    wanted = table[[1, 5, 60]] @ table.T
    for kind in ("int8", "int8-dynamic", "int4"):
        file = tmp_path / f"{kind}.onnx"
        onnx_quantize.quantize_file(tmp_path / "whole.onnx", file, kind)
        sizes = {len(tensor.raw_data) for tensor in onnx.load(file).graph.initializer}
        assert max(sizes) == 64 * 32, kind  # a byte each, for the table and the layer
        (found,) = session(file).run(None, {"i": np.array([1, 5, 60])})
        assert 0 < apart(found, wanted) < (0.1 if kind == "int4" else 0.02)


def test_rows_of_tables_have_scales_of_their_own():
    from onnx import TensorProto, helper, numpy_helper

    table = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32) * (10.0 ** np.arange(-2, 4))[:, None]
    table = table.astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["t", "i"], ["y"])], "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 32])], [numpy_helper.from_array(table, "t")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx_quantize.round_tables(model)
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.INT8, TensorProto.FLOAT}
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"i": np.array([0, 3, 5])})
    for row, wanted in zip(found, table[[0, 3, 5]], strict=True):
        assert np.abs(row - wanted).max() <= np.abs(wanted).max() / 250
