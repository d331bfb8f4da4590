"""Two processes that share text and sites (torchrun, gloo) against one, with one thread and with two.

    OMP_WAIT_POLICY=passive python benchmarks/processes.py --model FOLDER --methods drone,eckart

Whole commands, imports included; they take turns. Stored as float32, so that the outputs can be compared beyond the
checkpoint's own type. Without arguments: the bundled demo model, offline.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import COMPRESS, Ran, markdown, watched
from transformers import PreTrainedModel
from transformers.utils import logging

import eckart
from eckart.demo.steps import MODEL
from eckart.forms import FactoredLinear
from eckart.model import dense_weight

ONE = "one process"
WAYS = {  # name -> processes, threads of each
    ONE: (1, 1),
    "one process, two threads": (1, 2),
    "two processes": (2, 1),
}
MB = 1e6


def run(way: str, method: str, options: argparse.Namespace, output: Path) -> Ran:
    """`eckart compress` in one way; what was there before is replaced."""
    processes, threads = WAYS[way]
    asked = {
        "method": method, "keep": options.keep, "data": options.data, "stream": options.stream, "dtype": options.dtype,
        "num-samples": options.num_samples, "max-seq-length": options.max_seq_length,
        "batch-size": options.batch_size, "output-dir": output,
    }  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    compress = COMPRESS if processes == 1 else (*launcher, *COMPRESS[1:])
    shutil.rmtree(output, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if Path(options.model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    command = [*compress, options.model, *(word for name, value in asked.items() for word in (f"--{name}", value))]
    return watched(command, output.with_name(f"{output.name}.log"), environment=environment)


def report_of(output: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((output / "eckart" / "report.json").read_text(encoding="utf-8"))
    return report


@torch.no_grad()
def product(model: PreTrainedModel, site: str) -> torch.Tensor:
    """The matrix that a site stands for, (out, in), float64."""
    module = model.get_submodule(site)
    matrix = module.to_dense() if isinstance(module, FactoredLinear) else dense_weight(module)
    return matrix.double()


def difference(one: Path, other: Path) -> tuple[float, str, int]:
    """The largest relative difference in Frobenius norm of a site's products, that site, and how many ranks differ."""
    first, second = eckart.load(one, dtype=torch.float32), eckart.load(other, dtype=torch.float32)
    sites, others = report_of(one)["sites"], report_of(other)["sites"]
    ranks = sum(a["rank"] != b["rank"] for a, b in zip(sites, others, strict=True))
    worst, where = 0.0, "-"
    for site in (entry["site"] for entry in sites):
        before, now = product(first, site), product(second, site)
        apart = float((now - before).norm() / before.norm())
        if apart > worst:
            worst, where = apart, site
    return worst, where, ranks


def table(method: str, options: argparse.Namespace, work: Path) -> list[list[Any]] | str:
    """Rows of one method: what was measured, in each way; or what failed."""
    runs: dict[str, list[Ran]] = {way: [] for way in WAYS}
    steps: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for repeat in range(options.repeats):
        for place, way in enumerate(WAYS):
            output = work / f"{method}-{place}"
            ran = run(way, method, options, output)
            if ran.code != 0:
                return f"{way}: {ran.last_words}"
            runs[way].append(ran)
            steps[way].append(report_of(output)["seconds"])
            print(f"{method}, {repeat + 1}, {way}: {ran.seconds:.1f} s, {ran.peak / MB:.0f} MB", flush=True)
    median = {way: statistics.median(ran.seconds for ran in runs[way]) for way in WAYS}
    apart = {way: difference(work / f"{method}-0", work / f"{method}-{i}") for i, way in enumerate(WAYS) if way != ONE}

    def row(name: str, cells: dict[str, Any]) -> list[Any]:
        return [f"{method}: {name}", *(cells.get(way, "-") for way in WAYS)]

    rows = [
        row("seconds", {way: f"{median[way]:.1f}" for way in WAYS}),
        row("times as fast", {way: f"{median[ONE] / median[way]:.2f}" for way in WAYS}),
    ]
    for step in steps[ONE][0]:
        own = {way: statistics.median(seconds.get(step, 0.0) for seconds in steps[way]) for way in WAYS}
        rows.append(row(f"{step} s", {way: f"{own[way]:.2f}" for way in WAYS}))
    rows += [
        row("peak memory of all", {way: f"{max(ran.peak for ran in runs[way]) / MB:.0f} MB" for way in WAYS}),
        row("largest difference of a site", {way: f"{worst:.1e}" for way, (worst, _, _) in apart.items()}),
        row("at", {way: where for way, (_, where, _) in apart.items()}),
        row("sites of another rank", {way: ranks for way, (_, _, ranks) in apart.items()}),
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--methods", default="drone,kfac,eckart")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stream", default="auto", help="auto, on or off")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32", help="of the stored numbers")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--max-seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    logging.disable_progress_bar()
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory(prefix="eckart-processes-") as work:
        for method in options.methods.split(","):
            found = table(method, options, Path(work))
            if isinstance(found, str):
                print(f"{method} failed, {found}", flush=True)
            else:
                rows += found
    print(
        f"\n{Path(options.model).name}, {options.num_samples} x {options.max_seq_length} tokens, keep {options.keep}, "
        f"--stream {options.stream}; medians of {options.repeats}; torch {torch.__version__}, CPUs: {os.cpu_count()}; "
        "threads of a process: 1 unless it says two.\n"
    )
    print(markdown(["", *WAYS], rows))


if __name__ == "__main__":
    main()
