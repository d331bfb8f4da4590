"""Every method of the survey side by side, before and after recovery, on real tasks.

    python benchmarks/survey.py --work FOLDER --encoder MINILM --sst2 DIR --mrpc DIR --llama DIR --gpt2 DIR

Encoders are fine-tuned by this script; all rows of a task get the same number of recovery steps. Each model is
published, and reloaded in a fresh process before it is scored and timed against the dense one. What was measured is
kept in results.json in the work folder: broken off and started again, it goes on with what is missing. `--quick`
takes one keep, fewer steps and less text.

SST-2 and MRPC are folders of train.tsv and dev.tsv or test.tsv; the decoders' folders hold (or lie beside one that
holds) calibration.txt, train.txt and held.txt. A task whose folder is not given is left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import interleaved, markdown

CLI = (sys.executable, "-W", "ignore", "-m", "eckart")
BATCH, LENGTH = 32, 64
"""Rows and tokens of a batch that is timed."""


@dataclass(frozen=True)
class Task:
    """A task and the dense model that knows it."""

    name: str
    kind: str  # "classification" or "causal"
    model: Path
    train: Path
    calibration: Path
    held: Path
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """The columns, as options."""
        names = {"text": "--data-column", "pair": "--data-pair-column", "label": "--data-label-column"}
        return [word for key, value in self.columns.items() for word in (names[key], value)]


@dataclass(frozen=True)
class Row:
    """How a row is made: compressed, or not; then tuned."""

    name: str
    compress: tuple[str, ...] | None
    recovery: tuple[str, ...]
    teacher: bool = True
    bare: bool = False  # starts from the model before it learnt the task


def rows(keep: float, kind: str) -> Iterator[Row]:
    """All methods at a keep."""
    distil = ("--recovery", "distil")
    for method in ("svd", "fwsvd", "asvd", "drone", "svd-llm", "kfac", "kronecker", "eckart"):
        yield Row(method, ("--method", method, "--keep", str(keep)), distil)
    yield Row("svd, noach-goldberg", ("--method", "svd", "--keep", str(keep)), ("--recovery", "noach-goldberg"))
    yield Row("eckart, lora", ("--method", "eckart", "--keep", str(keep)), ("--recovery", "lora"), teacher=False)
    option = ("--recovery-option", f"keep={keep}")
    yield Row("losparse", None, ("--recovery", "losparse", *option), teacher=False)
    if kind == "classification":
        yield Row("losparse, distilled", None, ("--recovery", "losparse-distil", *option))


def other_rows(kind: str) -> Iterator[Row]:
    """Methods with sizes of their own."""
    yield Row("kngpt2, ilkd", ("--method", "kngpt2"), ("--recovery", "ilkd"))
    for form in ("lowrank", "kronecker", "safe"):
        words = ("--method", "svd", "--keep", "1", "--embeddings", form, "--embeddings-keep", "0.25")
        yield Row(f"embedding {form}", words, ("--recovery", "distil"))
    if kind == "classification":
        yield Row("dsee", None, ("--recovery", "dsee"), teacher=False, bare=True)


def call(*words: Any) -> str:
    """A command of eckart; its error is ours."""
    done = subprocess.run([*CLI, *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(" ".join((done.stderr or done.stdout).strip().splitlines()[-2:])[:300])
    return done.stdout


def fresh(folder: Path, dense: Path, task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Score a folder in a process of its own."""
    job = {"folder": str(folder), "dense": str(dense), "kind": task.kind, "held": str(task.held),
           "columns": task.columns, "tokens": options.tokens}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--score", json.dumps(job)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:300])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Quality, size and latency of a published model; the score is accuracy or perplexity."""
    from transformers import AutoTokenizer

    import eckart
    from eckart.data import load_task
    from eckart.measure import classification, perplexity, sizes

    tokenizer = AutoTokenizer.from_pretrained(job["dense"])
    model, dense = (eckart.load(job[key], dtype=torch.float32).eval() for key in ("folder", "dense"))
    if job["kind"] == "classification":
        columns = {"label" if key == "label" else f"{key}_column": name for key, name in job["columns"].items()}
        task = load_task(job["held"], column=columns.pop("text_column"), **columns)
        value = classification(model, tokenizer, task, max_seq_length=128, disable=True)["accuracy"]
    else:
        text = Path(job["held"]).read_text(encoding="utf-8")
        found = perplexity(model, tokenizer, text, window=256, max_tokens=job["tokens"], disable=True)
        value = found["perplexity"]
    ids = torch.randint(5, model.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    def run(one: Any) -> Any:
        with torch.no_grad():
            return lambda: one(input_ids=ids)

    with torch.no_grad():
        seconds = interleaved({"row": run(model), "dense": run(dense)}, 7)
    after = sizes(model).model
    return {
        "score": value, "elements": after.elements, "bytes": after.bytes, "multiply_adds": after.multiply_adds,
        "latency": seconds["row"] / seconds["dense"],
    }  # fmt: skip


def rounded(dense: Path, task: Task, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The dense model, its sites rounded to int8, scored like the rows; bytes are what storing it would take."""
    import eckart
    from eckart.checkpoint.tokenizer import load_tokenizer
    from eckart.measure import quantised_baseline
    from eckart.model import find_sites

    model = eckart.load(dense, dtype=torch.float32)
    quantised = quantised_baseline(model, [site.name for site in find_sites(model).chosen], 8)
    folder = work / "int8"
    shutil.rmtree(folder, ignore_errors=True)
    quantised.model.save_pretrained(folder)
    load_tokenizer(dense).save_pretrained(folder)
    found = fresh(folder, dense, task, options)
    shutil.rmtree(folder)
    return found | {"bytes": quantised.model_bytes, "latency": None}


def tuned(
    source: Path, output: Path, task: Task, words: Sequence[str], teacher: Path | None, steps: int,
    options: argparse.Namespace,
) -> Path:  # fmt: skip
    shutil.rmtree(output, ignore_errors=True)
    taught = ("--teacher", teacher) if teacher is not None else ()
    more = ("--max-seq-length", 128, "--batch-size", 32) if task.kind == "classification" else (
        "--max-seq-length", 256, "--batch-size", 8, "--eval-data", task.calibration, "--eval-samples", 24,
    )  # fmt: skip
    call("tune", source, "--task", task.kind, "--data", task.train, *task.words, *words, *taught, "--max-steps", steps,
         *more, "--seed", options.seed, "--output-dir", output)  # fmt: skip
    return output


def compressed(source: Path, output: Path, task: Task, words: Sequence[str], options: argparse.Namespace) -> Path:
    shutil.rmtree(output, ignore_errors=True)
    samples = (1024, 128) if task.kind == "classification" else (128, 256)
    more = {"num-samples": samples[0], "max-seq-length": samples[1], "batch-size": 16, "seed": options.seed}
    columns = task.columns if task.kind == "classification" else {}
    named = {"data-column": columns.get("text"), "data-target-column": columns.get("pair")}
    settings = [w for key, v in (more | named).items() if v is not None for w in (f"--{key}", v)]
    call("compress", source, *words, "--data", task.calibration, *settings, "--dtype", "float32",
         "--output-dir", output)  # fmt: skip
    return output


class Records:
    """What was measured, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def measured(self, key: str, measure: Any) -> dict[str, Any]:
        """The record under a key; measured now, if it is not there yet."""
        if key not in self.all or "error" in self.all[key]:
            start = time.perf_counter()
            try:
                self.all[key] = measure()
            except RuntimeError as error:
                self.all[key] = {"error": str(error)}
            self.all[key]["seconds"] = round(time.perf_counter() - start, 1)
            unfinished = self.path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.all, indent=1))
            unfinished.replace(self.path)
        print(key, json.dumps(self.all[key]), flush=True)
        return dict(self.all[key])


def one(row: Row, task: Task, dense: Path, records: Records, options: argparse.Namespace, place: str) -> list[Any]:
    """Make, score, recover and score a row."""
    work: Path = options.work
    key = f"{task.name}/{place}/{row.name}"
    bare, better = work / "row", work / "row-tuned"

    def before() -> dict[str, Any]:
        assert row.compress is not None
        return fresh(compressed(dense, bare, task, row.compress, options), dense, task, options)

    def after() -> dict[str, Any]:
        source = task.model if row.bare else dense
        if row.compress is not None:
            source = bare if bare.is_dir() else compressed(dense, bare, task, row.compress, options)
        taught = dense if row.teacher else None
        return fresh(tuned(source, better, task, row.recovery, taught, options.steps, options), dense, task, options)

    shutil.rmtree(bare, ignore_errors=True)
    first = records.measured(f"{key}/before", before) if row.compress is not None else {}
    second = records.measured(f"{key}/after", after)
    whole = records.all[f"{task.name}/dense"]["elements"]
    cells = second if "score" in second else first
    return [
        place, row.name, first.get("score", "-"), second.get("score", second.get("error", "-")),
        f"{cells['elements'] / whole:.3f}" if "elements" in cells else "-", cells.get("latency", "-"),
    ]  # fmt: skip


def survey(task: Task, records: Records, options: argparse.Namespace) -> None:
    """The table of a task."""
    work: Path = options.work
    dense = task.model
    if task.kind == "classification":
        dense = work / f"{task.name}-dense"
        if not dense.is_dir():
            tuned(task.model, dense, task, ("--recovery", "full"), None, options.dense_steps, options)
    start = records.measured(f"{task.name}/dense", lambda: fresh(dense, dense, task, options))
    int8 = records.measured(f"{task.name}/int8", lambda: rounded(dense, task, options, work))
    table: list[list[Any]] = [["1", "dense", start["score"], "-", "1.000", 1.0]]
    share = f"{int8['bytes'] / start['bytes']:.3f} of the bytes" if "bytes" in int8 else "-"
    table.append(["1", f"rounded to int8 ({share})", int8.get("score", "-"), "-", "1.000", "-"])
    places = [(str(keep), row) for keep in options.keeps for row in rows(keep, task.kind)]
    places += [("own", row) for row in other_rows(task.kind)]
    asked = [(place, row) for place, row in places if not options.only or row.name in options.only]
    table += [one(row, task, dense, records, options, place) for place, row in asked]
    measure = "accuracy" if task.kind == "classification" else "perplexity"
    print(f"\n{task.name}: {measure}; {options.steps} steps of recovery\n")
    columns = ["keep", "method", "before", "after recovery", "stored numbers / dense", "latency / dense"]
    print(markdown(columns, table), flush=True)


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Those whose folders are given."""
    if options.encoder and options.sst2:
        train, held = options.sst2 / "train.tsv", options.sst2 / "dev.tsv"
        yield Task("sst2", "classification", options.encoder, train, train, held, {"text": "0", "label": "1"})
    if options.encoder and options.mrpc:
        train, held = options.mrpc / "train.tsv", options.mrpc / "test.tsv"
        columns = {"text": "#1 String", "pair": "#2 String", "label": "Quality"}
        yield Task("mrpc", "classification", options.encoder, train, train, held, columns)
    for name in ("llama", "gpt2"):
        folder = getattr(options, name)
        if folder:
            texts = options.texts or folder
            paths = [texts / f"{part}.txt" for part in ("train", "calibration", "held")]
            yield Task(name, "causal", folder, *paths)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "eckart-survey", help="kept")
    for name in ("encoder", "sst2", "mrpc", "llama", "gpt2"):
        parser.add_argument(f"--{name}", type=Path, help="folder")
    parser.add_argument("--texts", type=Path, help="folder of the decoders' texts; default: each one's own")
    parser.add_argument("--keeps", default="0.5,0.25")
    parser.add_argument("--steps", type=int, default=200, help="of recovery, the same for all rows")
    parser.add_argument("--dense-steps", type=int, default=650, help="of fine-tuning the encoder")
    parser.add_argument("--tokens", type=int, default=65_536, help="of held-out text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="rows by name, separated by semicolons")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--score", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.keeps, options.steps, options.dense_steps, options.tokens = "0.5", 20, 100, 8_192
    options.only = options.only.split(";") if options.only else []
    options.keeps = [float(word) for word in options.keeps.split(",")]
    return options


def main() -> None:
    options = arguments()
    if options.score:
        print(json.dumps(score(json.loads(options.score))))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    records = Records(options.work / ("quick.json" if options.quick else "results.json"))
    for task in tasks(options):
        survey(task, records, options)


if __name__ == "__main__":
    main()
