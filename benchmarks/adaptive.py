"""Less for easy inputs: early exit and token skipping, alone and together, on dense and on factored classifiers.

    python benchmarks/adaptive.py --work FOLDER --encoder MINILM --sst2 DIR --mrpc DIR

The encoder learns each task as in survey.py (folders as there), and is compressed by eckart. Then, on the dense and on
the factored model: tokens leave (`--recovery token-skipping`), rows leave (`--recovery early-exit`), or both. The
threshold of the exits is chosen on rows that nothing was trained on; accuracy is that of the test rows, which nothing
else reads.
Multiply-adds are those of linear layers on test rows, one by one without padding. Latencies are processor time on one
thread, batches of 1 and of 32 test rows in the order of the file, all models in turn in one process.

Everything that is made is kept in the work folder: started again, the script goes on with what is missing. Without
`--repeats` nothing is timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import show
from survey import tasks
from survey_jobs import Task, compressed, fine_tuned, in_fresh_process, scored, tuned
from transformers import AutoTokenizer

import eckart
from eckart.adaptive import in_words
from eckart.data import load_task
from eckart.data.padding import collate, encode
from eckart.evaluation.sizes import measure_multiply_adds

COLUMNS = ["task", "model", "accuracy", "points below dense", "multiply-adds a row", "fewer than dense",
           "faster, batch 1", "faster, batch 32"]  # fmt: skip


def made(task: Task, options: argparse.Namespace) -> dict[str, Path]:
    """Name of each row -> its folder; what is not there is made."""
    work: Path = options.work
    dense = fine_tuned(task, work, options.dense_steps, options.seed)
    factored = work / f"{task.name}-eckart-{options.keep}"
    if not factored.is_dir():
        in_fresh_process(
            compressed, dense, factored, task, {"method": "eckart", "keep": options.keep}, options.samples, options.seed
        )
    found = {}
    sources = ("dense", dense, options.skip), (f"eckart, keep {options.keep}", factored, options.skip_factored)
    for name, source, skip in sources:
        fewer, early, both = (source.with_name(f"{source.name}-{kind}") for kind in ("skipping", "exit", "both"))
        skipping = {
            "recovery": "token-skipping", "recovery_option": (f"speedup={skip}",), "seed": options.seed,
            "learning_rate": 5e-5, "batch_size": 32,
        }  # fmt: skip
        if not fewer.is_dir():
            in_fresh_process(tuned, source, fewer, task, skipping, dense, options.steps)
        for folder, start in ((early, source), (both, fewer)):
            if not folder.is_dir():
                in_fresh_process(exited, start, folder, task, options.max_drop, options.seed)
        found |= {name: source, f"{name}, token skipping": fewer, f"{name}, early exit": early, f"{name}, both": both}
    return found


def exited(source: Path, output: Path, task: Task, drop: float, seed: int) -> None:
    """Give a model exits."""
    recipe = eckart.TuneRecipe(
        model=str(source), recovery="early-exit", recovery_option=(f"max_drop={drop}", "choose_on=eval"),
        task=task.kind, data=str(task.train), eval_data=str(task.valid), **task.columns, max_seq_length=task.length,
        batch_size=32, seed=seed,
    )  # fmt: skip
    eckart.tune(recipe.model, recipe=recipe, output_dir=output, overwrite=output.exists(), restart=True)


def test_rows(task: Task, tokenizer: Any, count: int) -> list[dict[str, list[int]]]:
    """Tokenized rows of the test file, in its order."""
    names = {"column": "data_column", "pair_column": "data_target_column", "label": "data_label_column"}
    columns = {key: task.columns[name] for key, name in names.items() if name in task.columns}
    rows = load_task(str(task.held), **columns, num_samples=count)
    return list(encode([row.text for row in rows], tokenizer, task.length))


def measured(folders: dict[str, Path], task: Task, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each row multiply-adds, and milliseconds of processor time of a batch of 1 and of 32."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folders["dense"])
    rows = test_rows(task, tokenizer, options.timed)
    batches = {size: [collate(rows[i : i + size], 0) for i in range(0, len(rows), size)] for size in (1, 32)}
    models = {name: eckart.load(folder, dtype=torch.float32).eval() for name, folder in folders.items()}
    found: dict[str, dict[str, Any]] = {}

    def run(model: Any, size: int) -> None:
        for batch in batches[size]:
            model(**batch)

    with torch.no_grad():
        for name, model in models.items():
            total = measure_multiply_adds(model, lambda model=model: run(model, 1))
            found[name] = {"words": in_words(model), "multiply_adds": total / len(rows)}
        for size in batches if options.repeats else ():
            times: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(options.repeats):
                for name, model in models.items():
                    start = time.process_time()
                    run(model, size)
                    times[name].append(time.process_time() - start)
            for name, taken in times.items():
                found[name][size] = statistics.median(taken) / len(batches[size])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "eckart-adaptive", help="kept")
    for name in ("encoder", "sst2", "mrpc"):
        parser.add_argument(f"--{name}", type=Path, help="folder")
    parser.add_argument("--keep", type=float, default=0.35, help="of the linear layers, in the factored model")
    parser.add_argument("--max-drop", type=float, default=0.5, help="points that exits may lose where they are chosen")
    parser.add_argument("--skip", type=float, default=1.5, help="speed-up that token skipping is asked for")
    parser.add_argument("--skip-factored", type=float, default=1.2, help="the same, of the factored model itself")
    parser.add_argument("--steps", type=int, default=220, help="of token skipping, of 32 rows")
    parser.add_argument("--dense-steps", type=int, default=650, help="of fine-tuning the encoder")
    parser.add_argument("--rows", type=int, default=16, help="of a step; pairs: half as many")
    parser.add_argument("--samples", type=int, default=2048, help="sentences to calibrate on")
    parser.add_argument("--tokens", type=int, default=32_768, help="rows to score: a quarter of it at most")
    parser.add_argument("--timed", type=int, default=256, help="test rows that are timed, and counted")
    parser.add_argument("--repeats", type=int, default=5, help="how often they are timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.gpt2 = options.llama = options.texts = None
    options.work.mkdir(parents=True, exist_ok=True)
    rows: list[list[Any]] = []
    for task in tasks(options):
        folders = made(task, options)
        found = in_fresh_process(measured, folders, task, options)
        scores = {
            name: in_fresh_process(scored, folder, folders["dense"], task, options.tokens, 0)["score"]
            for name, folder in folders.items()
        }
        for name, score in scores.items():
            one, whole = found[name], found["dense"]
            ratios = [whole[size] / one[size] if size in one else "-" for size in (1, 32)]
            below = 100 * (scores["dense"] - score)
            million = f"{one['multiply_adds'] / 1e6:.0f} M"
            rows.append(
                [task.name, name, score, below, million, whole["multiply_adds"] / one["multiply_adds"], *ratios]
            )
        for name, one in found.items():
            if one["words"]:
                print(f"{name}: {'; '.join(one['words'])}")
    show("less for easy inputs", COLUMNS, rows, options.output)


if __name__ == "__main__":
    main()
