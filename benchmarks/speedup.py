"""Asking for a speed: `--speedup 1.9` on fine-tuned encoders, what is reached, and what accuracy is left.

    python benchmarks/speedup.py --work FOLDER --encoder MINILM --sst2 DIR --mrpc DIR

The encoder learns each task as in survey.py (folders as there), and is compressed to the speed at batch 32 x 64 tokens
in float32 without any training afterwards. The speed is measured again on the published model, in turn with the dense
one, and the accuracy on the held-out rows of the task. What is slower than dense is said too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import show
from survey import tasks
from survey_jobs import BATCH, LENGTH, compressed, fine_tuned, in_fresh_process, scored

COLUMNS = ["task", "model", "accuracy", "points below dense", "speed-up asked", "speed-up measured", "kept", "forms"]


def forms_of(folder: Path) -> str:
    """How many weights are stored in each form."""
    plan = json.loads((folder / "eckart" / "plan.json").read_text(encoding="utf-8"))
    forms = Counter(entry["form"] for entry in plan["sites"].values())
    return ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "eckart-speedup", help="kept")
    for name in ("encoder", "sst2", "mrpc"):
        parser.add_argument(f"--{name}", type=Path, help="folder")
    parser.add_argument("--speedup", type=float, default=1.9)
    parser.add_argument("--dense-steps", type=int, default=650, help="of fine-tuning the encoder")
    parser.add_argument("--rows", type=int, default=16, help="of a step; pairs: half as many")
    parser.add_argument("--samples", type=int, default=2048, help="sentences to calibrate on")
    parser.add_argument("--tokens", type=int, default=32_768, help="rows to score: a quarter of it at most")
    parser.add_argument("--repeats", type=int, default=15, help="how often a batch is timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.gpt2 = options.llama = options.texts = None
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    rows: list[list[Any]] = []
    for task in tasks(options):
        dense = fine_tuned(task, options.work, options.dense_steps, options.seed)
        before = in_fresh_process(scored, dense, dense, task, options.tokens, 0)
        folder = options.work / f"{task.name}-fast"
        asked = {"speedup": options.speedup, "latency_batch_size": BATCH, "latency_length": LENGTH}
        in_fresh_process(compressed, dense, folder, task, asked, options.samples, options.seed)
        after = in_fresh_process(scored, folder, dense, task, options.tokens, options.repeats)
        rows.append([task.name, "dense", before["score"], "-", "-", 1.0, 1.0, "-"])
        rows.append(
            [task.name, "eckart", after["score"], 100 * (before["score"] - after["score"]), options.speedup,
             1 / after["latency"], after["elements"] / before["elements"], forms_of(folder)]
        )  # fmt: skip
        print(rows[-2:], flush=True)
    show(f"--speedup {options.speedup:g} at {BATCH} x {LENGTH} tokens, float32", COLUMNS, rows, options.output)


if __name__ == "__main__":
    main()
