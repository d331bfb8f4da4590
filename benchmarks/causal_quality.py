"""Perplexity of a causal model after every method, at equal stored parameters of its linear layers.

    python benchmarks/causal_quality.py --model FOLDER --calibration calibration.txt --held held.txt

Without arguments: SmolLM2-135M and WikiText-2 from the hub. The last column is the excess `ln(ppl / dense ppl)`
over that of uniform low-rank `svd-llm` at the same keep. Sizes are exact, as the papers state them (`target none`).
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from common import show, variants_of_default
from transformers import AutoModelForCausalLM, AutoTokenizer

import eckart
from eckart.evaluation.perplexity import measure_perplexity
from eckart.evaluation.rounding import round_weights
from eckart.methods import METHODS
from eckart.model import find_sites

REFERENCE = "svd-llm"


def rows() -> list:
    kfac = METHODS["kfac"]
    return [
        METHODS["svd"],
        METHODS["fwsvd"],
        METHODS["fwsvd-columns"],
        METHODS["asvd"],
        METHODS["drone"],
        METHODS["svd-llm"],
        kfac,
        replace(kfac, name="kfac, allocated", allocation="loss"),
        *variants_of_default(),
    ]


def held_text(path: str | None) -> str | list[str]:
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    from datasets import load_dataset

    return "\n".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--calibration", help="text file; WikiText-2's training split otherwise")
    parser.add_argument("--held", help="text file; WikiText-2's test split otherwise")
    parser.add_argument("--keeps", default="0.8,0.6,0.4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument(
        "--windows", type=int, default=112, help="calibration windows; 8 more decide whether a refit is kept"
    )
    parser.add_argument(
        "--only",
        default="",
        help="rows by name, separated by semicolons; the reference is always there, beside the reference",
    )
    parser.add_argument("--held-tokens", type=int, default=131072)
    parser.add_argument("--output", type=Path, help="also write the table as JSON")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = held_text(options.held)
    keeps = [float(keep) for keep in options.keeps.split(",")]

    def score(candidate: torch.nn.Module) -> float:
        measured = measure_perplexity(
            candidate, tokenizer, text, window=options.window, max_tokens=options.held_tokens, batch_size=16
        )
        return float(measured["nll_per_token"])

    only = options.only.split(";") if options.only else [method.name for method in rows()]
    methods = [method for method in rows() if method.name in (*only, REFERENCE)]
    dense = score(model)
    found: dict[tuple[str, float], list[float]] = {}
    kept: dict[tuple[str, float], float] = {}
    for seed in range(options.seeds):
        results = eckart.compare(
            model,
            tokenizer,
            methods=methods,
            keeps=keeps,
            data=options.calibration,
            num_samples=options.windows,
            max_seq_length=options.window,
            seed=seed,
            target="none",
        )
        for name, keep, result in results:
            found.setdefault((name, keep), []).append(score(result.model) - dense)
            kept[name, keep] = result.report["kept"]["of_sites"]
            print(f"seed {seed}  {name} at {keep}: {math.exp(dense + found[name, keep][-1]):.3f}", flush=True)
    table: list[list[object]] = [["dense", 1.0, 1.0, math.exp(dense), 0.0, "-"]]
    for bits in (8, 4):
        names = [site.name for site in find_sites(model).chosen]
        quantized = round_weights(model, names, bits)
        share = quantized.named_bytes / (2 * sum(site.elements for site in find_sites(model).chosen))
        excess = score(quantized.model) - dense
        name = f"round to nearest, int{bits} ({share:.3f} of 16-bit bytes)"
        table.append([name, "-", "-", math.exp(dense + excess), excess, "-"])
    for keep in keeps:
        reference = statistics.mean(found[REFERENCE, keep])
        for method in methods:
            excess = statistics.mean(found[method.name, keep])
            stored = kept[method.name, keep]
            table.append([method.name, keep, stored, math.exp(dense + excess), excess, f"{excess / reference:.3f}"])
    show(
        f"{Path(options.model).name}: held-out perplexity, mean of {options.seeds} calibration seeds of "
        f"{options.windows} x {options.window} tokens",
        ["method", "keep", "stored parameters", "perplexity", "excess", f"excess / {REFERENCE}"],
        table,
        options.output,
    )


if __name__ == "__main__":
    main()
