"""Speed on a CPU: dense against its factored copies in every form, beside dense in bfloat16 and int8.

    python benchmarks/speed_cpu.py --model all-MiniLM-L6-v2 --threads 1

all-MiniLM-L6-v2 in float32 at 32 x 64 tokens; BERT-base and SmolLM2-135M by their shapes, with random weights, in
float32 and bfloat16 at 32 x 128. Forms have the ranks of one `keep` for all weights; `default` is what the default
method makes of that size without a refit, which changes no size, and `latency` what it makes with `--objective latency`
and a profile of this machine; both on made-up text, or of MiniLM on `--text`. All copies of a model take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import show
from random_models import bert_base, factored, smol_llama
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import eckart
from eckart.checkpoint.source import resolve
from eckart.forms import FORMS
from eckart.speed.phases import DECODE, random_inputs

COLUMNS = ["model", "ms", "quartiles", "speed-up", "kept", "allowed", "reached / allowed"]


def copies(
    model: PreTrainedModel, keep: float, forms: list[str], plan: bool, size: tuple[int, int], text: dict[str, Any]
) -> dict[str, Any]:
    """Factored copies by name: each form alone at one keep for all weights, and what the default method makes."""
    made: dict[str, Any] = {f"{form} {keep:g}": factored(model, form, keep) for form in forms}
    data = text or {"data": [random_inputs(model, 2, size[1], seed) for seed in range(3)]}
    if plan:
        for name, objective in (("default", "size"), ("latency", "latency")):
            found = eckart.compress(
                model, refit=False, objective=objective, keep=keep, latency_batch_size=size[0],
                latency_length=size[1], device="cpu", **data,
            )  # fmt: skip
            made[f"{name} {keep:g}"] = found.model.eval()
    return made


def rows_of(
    title: str,
    model: PreTrainedModel,
    dtype: str,
    size: tuple[int, int],
    keeps: list[float],
    options: argparse.Namespace,
    text: dict[str, Any] | None = None,
) -> list[list[object]]:
    model = model.to(getattr(torch, dtype))
    others: dict[str, Any] = {}
    for keep in keeps:
        others |= copies(model, keep, options.forms, options.plan, size, text or {})
    rounded = eckart.bench(  # the honest lines: no factors at all
        {"again": model}, model, batch_sizes=size[0], lengths=size[1], dtype=dtype, decode=False, device="cpu",
        repeats=options.repeats, seconds=0, clock=options.clock,
    )  # fmt: skip
    timed = eckart.bench(
        others, model, batch_sizes=size[0], lengths=size[1], dtype=dtype, decode=False, baselines=False, device="cpu",
        repeats=options.repeats, seconds=options.seconds, clock=options.clock,
    )  # fmt: skip
    found = [row for row in timed["rows"] if row["phase"] != DECODE]
    found += [row for row in rounded["rows"] if row["model"] in ("original bfloat16", "original int8")]
    rows: list[list[object]] = []
    for row in found:
        seconds = row["seconds"]
        spread = f"{seconds['lower'] * 1e3:.4g}-{seconds['upper'] * 1e3:.4g}"
        rows.append(
            [f"{title}, {dtype}, {row['model']}", seconds["median"] * 1e3, spread, row["speedup"],
             row.get("kept_multiply_adds", "-"), row.get("allowed", "-"), row["reached"] or "-"]
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--text", help="sentences for MiniLM: a csv, of which the first column is read")
    parser.add_argument("--only", default="minilm,bert,llama", help="which models, separated by commas")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the random models")
    parser.add_argument("--forms", default="lowrank,joint,pivoted")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--no-plan", dest="plan", action="store_false", help="leave `--objective latency` out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", help="processor: on a busy machine, with one thread")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.forms = [form for form in options.forms.split(",") if form in FORMS]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    random: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
        "bert": ("BERT-base", bert_base),
        "llama": ("SmolLM2-135M", smol_llama),
    }
    rows: list[list[object]] = []
    for name in options.only.split(","):
        if name == "minilm":
            model = AutoModel.from_pretrained(resolve(options.model), dtype=torch.float32).eval()
            text = {}
            if options.text:
                folder = resolve(options.model)
                text = {"tokenizer": AutoTokenizer.from_pretrained(folder), "data": options.text, "data_column": "0",
                        "num_samples": 512, "source_folder": folder}  # fmt: skip
            rows += rows_of("MiniLM", model, "float32", (options.batch, 64), [options.keep, 0.35], options, text)
            continue
        for dtype in options.dtypes.split(","):
            rows += rows_of(random[name][0], random[name][1](), dtype, (options.batch, 128), [options.keep], options)
    show(
        f"speed on a CPU, batch {options.batch} x 64 or 128 tokens, {options.clock} time", COLUMNS, rows, options.output
    )


if __name__ == "__main__":
    main()
