"""What compressing costs: the linear algebra against one plain SVD, gathering Grams against plain forward passes, and
the refit of a whole compression against the gathering of its statistics.

    python benchmarks/compression_speed.py --model FOLDER --text sentences.csv
    python benchmarks/compression_speed.py --model FOLDER --text book.txt --samples 128 --length 2048 --device cuda

Ratios, measured side by side in one run. Without arguments: all-MiniLM-L6-v2 and STS-B from the hub.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from common import interleaved, show
from transformers import AutoModel, AutoTokenizer

import eckart
from eckart.calibration import calibrate
from eckart.checkpoint.source import resolve
from eckart.data import load_data
from eckart.data.inference import forward
from eckart.linalg import factorize
from eckart.methods import METHODS
from eckart.model import dense_weight, find_sites

KEEP = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--text", default="sentence-transformers/stsb")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, help="tokens of a window or text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--refit-only", action="store_true", help="only the compressions, not the parts on their own")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder = resolve(options.model)
    column = None if options.text.endswith(".txt") else "0" if Path(options.text).exists() else "sentence1"
    rows = compressions(options, folder, column)
    if not options.refit_only:
        rows = parts(options, folder, column) + rows
    show("compression speed", ["step", "seconds", "ratio"], rows, options.output)


def compressions(options: argparse.Namespace, folder: Path, column: str | None) -> list[list[object]]:
    """Seconds of the steps of whole compressions, as their reports say."""
    runs: list[dict[str, float]] = []
    for _ in range(max(1, options.repeats // 2)):
        result = eckart.compress(
            folder, data=options.text, data_column=column, num_samples=options.samples, max_seq_length=options.length,
            keep=KEEP, device=options.device,
        )  # fmt: skip
        runs.append(result.report["seconds"])
    steps = {
        "calibration": "statistics of inputs and gradients, in a whole compression",
        "factorization": "factors",
        "refit": "refit",
        "measuring": "held-out text, before and after the refit",
    }
    return [
        [words, *(statistics.median(value(run) for run in runs) for value in (seconds_of(step), ratio_of(step)))]
        for step, words in steps.items()
    ]


def seconds_of(step: str):
    return lambda run: run[step]


def ratio_of(step: str):
    return lambda run: run[step] / run["calibration"]


def parts(options: argparse.Namespace, folder: Path, column: str | None) -> list[list[object]]:
    """The parts of the work on their own."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = load_data(
        options.text, tokenizer=tokenizer, model=model, column=column, num_samples=options.samples, batch_size=32,
        max_seq_length=options.length,
    )  # fmt: skip
    sites = find_sites(model).chosen
    names = [site.name for site in sites]
    weights = {name: dense_weight(model.get_submodule(name)) for name in names}
    needs = METHODS["kfac"].needs
    moments = calibrate(model, names, data, needs=needs | {"absolute"}).moments
    weights = {name: weight for name, weight in weights.items() if name in moments}

    def plain_svd() -> None:
        for weight in weights.values():
            torch.linalg.svd(weight, full_matrices=False)

    def solve(method: str):
        def run() -> None:
            for name, weight in weights.items():
                solved = factorize(METHODS[method].metric(weight, moments[name]), name)
                solved.truncated(int(KEEP * weight.numel() / sum(weight.shape)))

        return run

    solving = interleaved(
        {"svd": plain_svd, **{name: solve(name) for name in ("drone", "kfac", "asvd")}}, options.repeats
    )

    @torch.no_grad()
    def plain_forward() -> None:
        for batch in data:
            forward(model, batch.inputs)

    def grams() -> None:
        assert calibrate(model, names, data, needs=frozenset({"gram"})).moments  # gathered when asked for

    def gradients() -> None:
        assert calibrate(model, names, data, needs=needs).moments

    gathering = interleaved({"forward": plain_forward, "gram": grams, "gradients": gradients}, options.repeats)
    return [
        [f"{len(weights)} weights, torch.linalg.svd (float32)", solving["svd"], 1.0],
        *(
            [f"{name}, curve of every rank and factors at keep {KEEP}", solving[name], solving[name] / solving["svd"]]
            for name in ("drone", "kfac", "asvd")
        ),
        [f"plain forward, {data.num_tokens} tokens", gathering["forward"], 1.0],
        ["gathering input Grams, forward included", gathering["gram"], gathering["gram"] / gathering["forward"]],
        [
            "gathering input and gradient Grams, backward included",
            gathering["gradients"],
            gathering["gradients"] / gathering["forward"],
        ],
    ]


if __name__ == "__main__":
    main()
