"""Speed on a GPU: layers and a model of a 7B's width, dense against every form; and what compressing costs there.

    python benchmarks/gpu.py

bfloat16, keep .5, random weights. Single layers at 8,192 tokens; two layers (4096 / 11008) at 4 x 2,048 tokens, and one
more token with a key-value cache; one token without a cache under CUDA graphs, where no launch is waited for; the refit
beside the statistics on a small model. Under four minutes. `--device cpu --tiny` runs the same code on tiny sizes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import show
from random_models import factored, llama, rank_for, sliced
from transformers import PreTrainedModel

import eckart
from eckart.forms import FORMS
from eckart.speed.clock import Run, measure_in_turn
from eckart.speed.measure_profile import measure_profile
from eckart.speed.phases import random_inputs

DTYPE = torch.bfloat16
COLUMNS = ["what", "ms", "speed-up", "kept", "allowed", "reached / allowed"]


def single_layers(width: int, inner: int, tokens: int, keep: float, device: str) -> list[list[object]]:
    """Weights that read one input, by themselves and joint; and a whole feed-forward layer."""
    groups = {
        "q, k, v": (width, (width,) * 3),
        "o": (width, (width,)),
        "gate, up": (width, (inner,) * 2),
        "down": (inner, (width,)),
    }
    feed_forward = (inner, inner, width)
    asked: list[tuple[Any, ...]] = [("sliced", width, feed_forward, (int(keep * inner), inner))]
    for n, heights in groups.values():
        asked.append(("dense", n, heights))
        for form in ("lowrank", "pivoted"):
            asked.append((form, n, heights[:1], (rank_for(form, heights[:1], n, keep),)))
        if len(heights) > 1:
            asked.append(("joint", n, heights, (rank_for("joint", heights, n, keep),)))
    profile = measure_profile(asked, tokens=tokens, dtype=DTYPE, device=device, repeats=11)
    rows: list[list[object]] = []
    for name, (n, heights) in groups.items():
        dense = profile.seconds("dense", n, heights)
        rows.append([f"{tokens} tokens, {name}, dense", dense * 1e3, 1.0, 1.0, 1.0, "-"])
        for form in ("lowrank", "joint", "pivoted"):
            if form == "joint" and len(heights) == 1:
                continue
            rank = rank_for(form, heights if form == "joint" else heights[:1], n, keep)
            products = len(heights) * rank * (n - (rank if form == "pivoted" else 0)) + rank * sum(heights)
            if form == "joint":
                products = rank * (n + sum(heights))
            kept = products / (n * sum(heights))
            seconds = profile.seconds(form, n, heights, rank)
            rows.append(row(f"{tokens} tokens, {name}, {form} rank {rank}", dense, seconds, kept))
    dense, seconds = (profile.seconds("sliced", width, feed_forward, count) for count in (inner, int(keep * inner)))
    rows.append(row(f"{tokens} tokens, feed-forward, sliced", dense, seconds, int(keep * inner) / inner))
    return rows


def row(what: str, dense: float, seconds: float, kept: float) -> list[object]:
    return [what, seconds * 1e3, dense / seconds, kept, 1 / kept, dense / seconds * kept]


def whole_model(
    model: PreTrainedModel, others: dict[str, Any], size: tuple[int, int], device: str
) -> list[list[object]]:
    """Prefill of a batch, and decode at batch 1 and 32 with a cache, eager."""
    rows: list[list[object]] = []
    for (batch, length), decode in ((size, False), ((1, 128), True), ((32, 128), True)):
        found = eckart.bench(
            others, model, batch_sizes=batch, lengths=length, dtype="bfloat16", decode=decode, baselines=False,
            device=device, repeats=11,
        )  # fmt: skip
        for each in found["rows"]:
            if decode == (each["phase"] == "decode"):
                what = f"{each['phase']} {batch} x {length}, {each['model']}"
                rows.append(
                    [what, each["seconds"]["median"] * 1e3, each["speedup"], each.get("kept_multiply_adds", "-"),
                     each.get("allowed", "-"), each["reached"] or "-"]
                )  # fmt: skip
    return rows


@torch.no_grad()
def graphs(models: dict[str, Any], device: str) -> list[list[object]]:
    """One token of each text of a batch, without a cache, as a CUDA graph; on a CPU as it is."""
    rows: list[list[object]] = []
    for batch in (1, 32):
        runs: dict[str, Run] = {}
        for name, model in models.items():
            inputs = random_inputs(model, batch, 1)

            def run(model: Any = model, inputs: Any = inputs) -> None:
                model(**inputs, use_cache=False)

            runs[name] = captured(run) if device != "cpu" else run
        timings = measure_in_turn(runs, repeats=21, device=device)
        dense = timings["dense"].median
        rows += [
            [f"graph, {batch} x 1 token, {name}", timing.median * 1e3, dense / timing.median, "-", "-", "-"]
            for name, timing in timings.items()
        ]
    return rows


def captured(run: Run) -> Run:
    """The work of a call as one CUDA graph, which is launched as a whole."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def compressing(width: int, layers: int, windows: int, length: int, device: str) -> list[list[object]]:
    """Seconds of the statistics (two-sided) and of the refit."""
    model = llama(width, 4 * width, layers, heads=8, groups=4, vocabulary=8192).to(device)
    stream = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 8192, (1, length), generator=stream) for _ in range(windows)]
    result = eckart.compress(model, data=[{"input_ids": one} for one in ids], keep=0.6, device=device)
    seconds = result.report["seconds"]
    statistics, refit = seconds["calibration"], seconds.get("refit", 0.0)
    what = f"compressing {layers} x {width}, {windows} x {length} tokens: "
    return [
        [f"{what}statistics", statistics * 1e3, "-", "-", "-", "-"],
        [f"{what}refit ({refit / statistics:.2f} of the statistics)", refit * 1e3, "-", "-", "-", "-"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the code runs")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--parts", default="layers,model,graphs,compressing", help="separated by commas")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("No GPU is here, and nothing was measured. `--device cpu --tiny` shows that the code runs.")
    device = options.device
    torch.manual_seed(0)
    parts = options.parts.split(",")
    width, inner, heads, tokens, size = (
        (64, 176, 4, 64, (2, 16)) if options.tiny else (4096, 11008, 32, 8192, (4, 2048))
    )
    rows: list[list[object]] = []
    start = time.perf_counter()
    if "layers" in parts:
        rows += single_layers(width, inner, tokens, options.keep, device)
    if "model" in parts or "graphs" in parts:
        with torch.device(device):
            model = llama(width, inner, 2, heads, heads, vocabulary=32000).to(DTYPE)
        forms = [form for form in ("lowrank", "joint", "pivoted") if form in FORMS]
        others: dict[str, Any] = {form: factored(model, form, options.keep) for form in forms}
        others["sliced"] = sliced(model, options.keep)
        rows += whole_model(model, others, size, device) if "model" in parts else []
        rows += graphs({"dense": model, **others}, device) if "graphs" in parts else []
        del model, others
    if "compressing" in parts:
        rows += compressing(*((32, 2, 4, 32) if options.tiny else (512, 8, 64, 1024)), device)
    name = torch.cuda.get_device_name(device) if device != "cpu" else "a CPU, for a trial of the code"
    show(f"{name}, bfloat16, keep {options.keep}, {time.perf_counter() - start:.0f} s", COLUMNS, rows, options.output)


if __name__ == "__main__":
    main()
