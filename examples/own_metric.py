"""A method of your own: a metric is one function, and everything else of eckart works with it.

Here each input feature counts by its mean square, as ASVD does by its mean magnitude, and the method is compared with
both that and DRONE, which looks at whole inputs. The small model that comes with eckart needs no download:

    python examples/own_metric.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eckart

DEMO = Path(eckart.__file__).parent / "demo" / "model"


def input_scale(weight: torch.Tensor, moments: Any) -> eckart.Problem:
    """`|| (W - W') diag(E[x^2])^(1/2) ||_F^2`, W (out, in)."""
    return eckart.Problem(weight, right=eckart.Metric(diagonal=moments["gram"].mean.diagonal()))


SCALE = eckart.Method(
    name="input-scale",
    title="inputs by their size",
    paper="",
    metric=input_scale,
    needs=frozenset({"gram"}),
    exact_for="the output error of independent inputs",
)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO), help="a folder, or a name on the hub")
    parser.add_argument("--data", default="stdlib", help="calibration text")
    parser.add_argument("--keep", type=float, default=0.6, help="fraction of the numbers that is stored")
    parser.add_argument("--windows", type=int, default=16, help="of text, to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    given = parser.parse_args(words)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(given.model), AutoTokenizer.from_pretrained(given.model)
    tried = eckart.compare(
        model, tokenizer, data=given.data, methods=["asvd", SCALE, "drone"], keeps=[given.keep],
        num_samples=given.windows, max_seq_length=given.length,
    )  # fmt: skip
    for method, _, result in tried:
        print(f"--- {method}\n{result}\n")


if __name__ == "__main__":
    main()
