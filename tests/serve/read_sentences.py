"""Load exported sentence encoders with a backend of sentence-transformers, in an environment without eckart.

python tests/serve/read_sentences.py FOLDER BACKEND
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer


def main() -> None:
    folder, backend = Path(sys.argv[1]), sys.argv[2]
    assert importlib.util.find_spec("eckart") is None, "this is to be run without eckart"
    texts = (folder / "texts.txt").read_text(encoding="utf-8").split("\n")
    expected = np.load(folder / "expected.npy")
    exact = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}} if backend == "openvino" else {}
    for name, allowed in ((backend, 1e-5), (f"{backend}-int8", 0.1)):
        model = SentenceTransformer(str(folder / name), backend=backend, device="cpu", model_kwargs=dict(exact))
        difference = float(np.abs(model.encode(texts) - expected).max())
        print(f"{name}: largest difference of an embedding {difference:.2g}")
        assert 0 < difference < allowed, name


if __name__ == "__main__":
    main()
