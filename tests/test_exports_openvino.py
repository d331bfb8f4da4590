"""OpenVINO: what it computes of an exported folder is what the checkpoint computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_folders import causal_folder, embeddings, expected_tokens, generate, prompts, sentence_folder

from eckart.errors import CheckpointError
from eckart.exports.engines import openvino as exporter
from eckart.exports.pipeline import export

openvino = pytest.importorskip("openvino", reason="pip install 'eckart[openvino]'")
pytest.importorskip("nncf", reason="pip install 'eckart[openvino]'")

CLOSE = 1e-5  # of the norm


def compiled(file: Path) -> Any:
    return openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def sentence(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sentence")
    source = sentence_folder(folder / "source")
    return source, export(source, folder / "out", format="openvino")


def test_embeddings_are_those_of_the_checkpoint(sentence):
    source, out = sentence
    batch, hidden, pooled = embeddings(source)
    found = compiled(out / "openvino" / "openvino_model.xml")
    assert [entry.any_name for entry in found.inputs] == ["input_ids", "attention_mask"]
    assert [str(entry.partial_shape) for entry in found.inputs] == ["[?,?]", "[?,?]"]
    made = found(batch)
    real = batch["attention_mask"].astype(bool)
    assert apart(made["last_hidden_state"][real], hidden[real]) < CLOSE
    assert apart(made["sentence_embedding"], pooled) < CLOSE


def test_folder_is_laid_out_for_its_readers(sentence):
    out = sentence[1]
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"openvino/openvino_model.xml", "openvino/openvino_model.bin", "modules.json", "1_Pooling/config.json",
            "2_Dense/model.safetensors", "README.md", "config.json", "tokenizer.json"} <= written  # fmt: skip
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert 'SentenceTransformer("out", backend="openvino")' in (out / "README.md").read_text()
    record = json.loads((out / "eckart" / "export.json").read_text())
    assert 0 < record["largest_relative_difference"]["sentence_embedding"] < CLOSE
    assert record["bytes"] == sum(path.stat().st_size for path in (out / "openvino").iterdir())


def test_products_that_are_shared_are_computed_once(sentence):
    """3 + 1 of the joint group, 2 of either two-factor weight, 1 of the dense output, 1 of Dense."""
    model = openvino.Core().read_model(sentence[1] / "openvino" / "openvino_model.xml")
    kinds = [operator.get_type_name() for operator in model.get_ops()]
    assert kinds.count("ScaledDotProductAttention") == 1
    assert kinds.count("MatMul") == 4 + 2 + 2 + 1 + 1


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4"])
def test_quantized_folder(kind, sentence, tmp_path, monkeypatch):
    source, out = sentence
    whole = out / "openvino" / "openvino_model.xml"
    monkeypatch.setattr(exporter, "convert", lambda _: openvino.Core().read_model(whole))
    made = export(source, tmp_path / kind, format="openvino", quantize=kind)
    record = json.loads((made / "eckart" / "export.json").read_text())
    assert 1e-3 < record["largest_relative_difference"]["sentence_embedding"] < (0.3 if kind == "int4" else 0.05)
    size = (made / "openvino" / "openvino_model.bin").stat().st_size
    assert size < 0.3 * whole.with_suffix(".bin").stat().st_size
    model = openvino.Core().read_model(made / "openvino" / "openvino_model.xml")
    types = {op.get_element_type().get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant"}
    assert ("i4" in types) == (kind == "int4")
    assert kind == "int4" or "i8" in types
    group = model.get_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]).astype(int)
    assert group == (32 if kind == "int8-dynamic" else 0)


def test_what_computes_something_else_is_not_published(sentence, tmp_path, monkeypatch):
    source, out = sentence
    load = exporter.load_session

    def wrong(model):
        run = load(model)
        return lambda batch: {name: value * 1.001 for name, value in run(batch).items()}

    model = openvino.Core().read_model(out / "openvino" / "openvino_model.xml")
    monkeypatch.setattr(exporter, "convert", lambda _: model)
    monkeypatch.setattr(exporter, "load_session", wrong)
    with pytest.raises(CheckpointError, match="in OpenVINO: what was written is not the model"):
        export(source, tmp_path / "out", format="openvino")
    assert not (tmp_path / "out").exists()


def test_greedy_tokens_are_those_of_transformers(tmp_path):
    source = causal_folder(tmp_path / "source")
    out = export(source, tmp_path / "out", format="openvino")
    found = compiled(out / "openvino" / "openvino_model.xml")
    shapes = {
        e.any_name: (e.partial_shape[1].get_length(), e.partial_shape[3].get_length())
        for e in found.inputs
        if e.any_name.startswith("past_key_values.")
    }
    assert shapes == {"past_key_values.0.key": (2, 8), "past_key_values.0.value": (2, 8)}
    names = [output.any_name for output in found.outputs]
    ids, mask = (tensor.numpy() for tensor in prompts())

    def run(batch):
        made = found(dict(batch))
        return {name: made[name].copy() for name in names}

    made = generate(run, shapes, ids, mask, 8)
    assert len(np.unique(made)) > 3
    np.testing.assert_array_equal(made, expected_tokens(source, 8))
