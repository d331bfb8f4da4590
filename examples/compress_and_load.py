"""Compress a model, publish it as a folder, load that folder in transformers, and generate.

Without arguments it takes the small model that comes with eckart, and needs no download:

    python examples/compress_and_load.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import eckart

DEMO = Path(eckart.__file__).parent / "demo" / "model"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO), help="a folder, or a name on the hub")
    parser.add_argument("--data", default="stdlib", help="calibration text, as for `eckart compress`")
    parser.add_argument("--keep", type=float, default=0.6, help="fraction of the numbers that is stored")
    parser.add_argument("--windows", type=int, default=16, help="of text, to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--output-dir", type=Path, help="keep the folder; a temporary one by default")
    given = parser.parse_args(words)

    with tempfile.TemporaryDirectory() as temporary:
        folder = given.output_dir or Path(temporary) / "small"
        result = eckart.compress(
            given.model, data=given.data, keep=given.keep, num_samples=given.windows, max_seq_length=given.length,
            output_dir=folder,
        )  # fmt: skip
        print(result)

        # From here on nothing but transformers is called: `import eckart` is what lets it load the folder.
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer("class Reader:\n    def read(self", return_tensors="pt")
        print(tokenizer.decode(model.generate(**prompt, max_new_tokens=16, do_sample=False)[0]))


if __name__ == "__main__":
    main()
