"""Which method, and how small? Try several, and take the smallest model that loses no more than you allow.

Without arguments it takes the small model that comes with eckart, and needs no download:

    python examples/choose_a_size.py --allow 0.1

The statistics of the text are gathered once for all methods and sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import eckart

DEMO = Path(eckart.__file__).parent / "demo" / "model"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO), help="a folder, or a name on the hub")
    parser.add_argument("--data", default="stdlib", help="calibration text, as for `eckart compare`")
    parser.add_argument("--methods", default="svd,drone,eckart")
    parser.add_argument("--keep", default="0.8,0.6,0.4")
    parser.add_argument(
        "--allow", type=float, default=0.2, help="divergence from the original, per token, on held-out text"
    )
    parser.add_argument("--windows", type=int, default=16, help="of text, to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    given = parser.parse_args(words)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(given.model), AutoTokenizer.from_pretrained(given.model)
    keeps = [float(word) for word in given.keep.split(",")]
    tried = eckart.compare(
        model, tokenizer, data=given.data, methods=given.methods.split(","), keeps=keeps,
        num_samples=given.windows, max_seq_length=given.length,
    )  # fmt: skip
    fitting = []
    for _ in tried:  # each result is made here, and could be published: result.save_pretrained("small")
        row = tried.rows[-1]
        divergence = row["quality"]["KL to the original"]
        print(f"{row['method']:<10} keep {row['keep']:<5g} divergence {divergence:.4f}")
        if divergence <= given.allow:
            fitting.append((row["of_model"], row["method"], row["keep"]))
    if fitting:
        share, method, keep = min(fitting)
        print(f"\nTake {method} at keep {keep:g}: {share:.0%} of the model's numbers.")
    else:
        print(f"\nNone of them is within {given.allow:g}: keep more.")


if __name__ == "__main__":
    main()
