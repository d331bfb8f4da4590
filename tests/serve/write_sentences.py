"""Sentence encoders for both backends of sentence-transformers, and the embeddings that they must give.

python tests/serve/write_sentences.py FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_folders import TEXTS, sentence_folder
from sentence_transformers import SentenceTransformer

import eckart  # noqa: F401  registers the format
from eckart.exports.pipeline import export


def main() -> None:
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = sentence_folder(folder / "source")
    np.save(folder / "expected.npy", SentenceTransformer(str(source), device="cpu").encode(TEXTS))
    (folder / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    for form in ("onnx", "openvino"):
        export(source, folder / form, format=form)
        export(source, folder / f"{form}-int8", format=form, quantize="int8-dynamic")


if __name__ == "__main__":
    main()
