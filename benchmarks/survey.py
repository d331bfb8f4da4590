"""Every method of the survey side by side, before and after recovery, on real tasks.

    python benchmarks/survey.py --work FOLDER --encoder MINILM --sst2 DIR --mrpc DIR --llama DIR --gpt2 DIR --texts DIR

Encoders are fine-tuned by this script; all rows of a task get the same number of recovery steps, but for those that
say otherwise. Each model is published, and reloaded in a fresh process before it is scored and timed against the dense
one. What was measured is kept in results.json in the work folder: broken off and started again, it goes on with what
is missing, and with what failed. `--quick` takes one encoder's task and one decoder, one keep, few steps and little
text, and times nothing.

SST-2 and MRPC are folders of train.tsv and test.tsv, SST-2's of dev.tsv too; `--texts` is a folder of calibration.txt,
train.txt and held.txt. A task whose folder is not given is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import markdown
from survey_jobs import Task, compared, compressed, in_fresh_process, rounded, scored, tuned

METHODS = ("svd", "fwsvd", "drone", "kfac", "basis-sharing", "kronecker", "eckart")
"""Of `eckart compress`; svd-llm has the optimum of drone."""
EMBEDDINGS = ("lowrank", "kronecker", "safe")
WHEN = ("before", "after")
DENSE_BATCH = 32
"""Rows of a step where an encoder learns its task."""
COLUMNS = ("keep", "method", "before", "after recovery", "numbers of the model", "latency at batch 32")


@dataclass(frozen=True)
class Row:
    """How a row is made: compressed, or not; then tuned.

    Attributes:
        name: of the row.
        compress: options of :func:`eckart.compress`; None where the recovery itself makes the model smaller.
        tune: options of :func:`eckart.tune`; None: none.
        taught: whether there is a teacher.
        bare: starts from the model before it learnt the task.
        times: the steps that all rows get.
    """

    name: str
    compress: dict[str, Any] | None
    tune: dict[str, Any] | None
    taught: bool = True
    bare: bool = False
    times: float = 1


def recovery(name: str, **options: Any) -> dict[str, Any]:
    """Options of a recovery, as `eckart tune` takes them."""
    rate = {"learning_rate": options.pop("learning_rate")} if "learning_rate" in options else {}
    return {"recovery": name, "recovery_option": tuple(f"{k}={v}" for k, v in options.items()), **rate}


def rows(keep: float) -> Iterator[Row]:
    """All methods at a keep of the linear layers."""
    for method in METHODS:
        curvature = "labels" if method == "fwsvd" else "sampled"  # its paper takes the task's own
        yield Row(method, {"method": method, "keep": keep, "curvature": curvature}, recovery("distil"))
    shared = {"keep": keep, "curvature": "sampled"}
    yield Row("svd, noach-goldberg", {"method": "svd", **shared}, recovery("noach-goldberg"))
    yield Row("svd, refit", {"method": "svd", **shared}, {"recovery": "refit"})
    yield Row("eckart, lora", {"method": "eckart", **shared}, recovery("lora"), taught=False)
    yield Row("losparse", None, recovery("losparse", keep=keep), taught=False)
    yield Row("losparse, distilled", None, recovery("losparse-distil", keep=keep))


def other_rows(kind: str, steps: int, dense_steps: int) -> Iterator[Row]:
    """Methods with sizes of their own, and embeddings at a quarter of theirs."""
    yield Row("kngpt2, ilkd", {"method": "kngpt2"}, recovery("ilkd"))
    if kind == "causal":
        yield Row("kngpt2, ilkd, 15 times the steps", {"method": "kngpt2"}, recovery("ilkd"), times=15)
    yield Row("sandwich", None, recovery("sandwich"))
    embeddings = {
        form: {"method": "svd", "keep": 1, "embeddings": form, "embeddings_keep": 0.25} for form in EMBEDDINGS
    }
    for form, options in embeddings.items():
        yield Row(f"embedding {form}", options, recovery("distil", embedding=1))
    if kind == "classification":
        times, batch = dense_steps / steps, {"batch_size": DENSE_BATCH}
        distil = recovery("distil", embedding=1, learning_rate=2e-4) | batch
        yield Row("embedding safe, trained as long as dense", embeddings["safe"], distil, times=times)
        dsee = recovery("dsee", rank=5, targets="*", learning_rate=2e-3) | batch
        yield Row("dsee, trained as long as dense", None, dsee, taught=False, bare=True, times=times)


class Records:
    """What was measured, in a file; `frozen`: and nothing is added."""

    def __init__(self, path: Path, frozen: bool = False) -> None:
        self.path = path
        self.frozen = frozen
        self.all: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def holds(self, key: str) -> bool:
        """Whether something was measured, and did not fail."""
        return key in self.all and "error" not in self.all[key]

    def measured(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record under a key; measured now, if it is not there yet or failed."""
        if not self.holds(key) and self.frozen:
            return {}
        if not self.holds(key):
            start = time.perf_counter()
            try:
                self.all[key] = measure()
            except Exception as error:  # whatever a row dies of, the others go on
                self.all[key] = {"error": f"{type(error).__name__}: {error}"[:300]}
            self.all[key]["seconds"] = round(time.perf_counter() - start, 1)
            unfinished = self.path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.all, indent=1), encoding="utf-8")
            unfinished.replace(self.path)
            print(key, json.dumps(self.all[key]), flush=True)
        return dict(self.all[key])


@dataclass
class Survey:
    """A task's rows, made and scored one after the other.

    Attributes:
        task: the task.
        records: what was measured.
        options: the command line's.
        dense: the model that knows the task.
    """

    task: Task
    records: Records
    options: argparse.Namespace
    dense: Path

    @property
    def work(self) -> Path:
        return Path(self.options.work)

    def score(self, folder: Path, *, timed: bool) -> dict[str, Any]:
        repeats = self.options.repeats if timed else 0
        found = in_fresh_process(scored, folder, self.dense, self.task, self.options.tokens, repeats)
        return dict(found)

    @property
    def eval_samples(self) -> int:
        """Rows or windows by which a recovery is kept or not."""
        tokens = int(self.options.tokens)
        return min(24, max(2, tokens // self.task.length)) if self.task.kind == "causal" else tokens // 8

    @property
    def samples(self) -> int:
        return int(self.options.samples if self.task.kind == "classification" else self.options.samples // 16)

    def prepare(self, rows: Sequence[Row]) -> None:
        """Compress by all methods that share their statistics, which are gathered once."""
        for curvature in ("sampled", "labels"):
            asked = [row.compress for row in rows if row.compress and row.compress.get("curvature") == curvature]
            missing = [options for options in asked if not self.prepared(options).is_dir()]
            methods, keeps = ([*dict.fromkeys(options[key] for options in missing)] for key in ("method", "keep"))
            if missing:
                folder = self.prepared(missing[0]).parent
                common = (curvature, self.samples, self.options.seed)
                in_fresh_process(compared, self.dense, folder, self.task, methods, keeps, *common)

    def prepared(self, options: dict[str, Any]) -> Path:
        """Where what was compressed together with others lies."""
        return self.work / f"{self.task.name}-compressed" / f"{options['method']}-{options.get('keep')}"

    def compress(self, row: Row) -> Path:
        assert row.compress is not None
        if "curvature" in row.compress:
            return self.prepared(row.compress)
        folder = self.work / "row"
        in_fresh_process(compressed, self.dense, folder, self.task, row.compress, self.samples, self.options.seed)
        return folder

    def tune(self, row: Row, source: Path) -> Path:
        folder = self.work / "row-tuned"
        steps = round(self.options.steps * row.times)
        options = {"seed": self.options.seed, "eval_samples": self.eval_samples} | (row.tune or {})
        in_fresh_process(tuned, source, folder, self.task, options, self.dense if row.taught else None, steps)
        return folder

    def int8(self) -> dict[str, Any]:
        folder = self.work / "int8"
        size = in_fresh_process(rounded, self.dense, folder)
        return self.score(folder, timed=False) | {"bytes": size}

    def key(self, place: str, row: Row, when: str) -> str:
        """Of a record; rows that are compressed alike have the same score before."""
        name = row.name.partition(",")[0] if when == "before" else row.name
        return f"{self.task.name}/{place}/{name}/{when}"

    def measure(self, place: str, row: Row) -> list[Any]:
        """Make, score, recover and score a row; returns its cells."""
        made: list[Path] = []

        def before() -> dict[str, Any]:
            made.append(self.compress(row))
            return self.score(made[0], timed=row.tune is None)

        def after() -> dict[str, Any]:
            source = self.task.model if row.bare else self.dense
            if row.compress is not None:
                source = made[0] if made else self.compress(row)
            return self.score(self.tune(row, source), timed=True)

        first = self.records.measured(self.key(place, row, "before"), before) if row.compress is not None else {}
        second = self.records.measured(self.key(place, row, "after"), after) if row.tune is not None else {}
        last = second if "score" in second else first
        whole = self.records.all.get(f"{self.task.name}/dense", {}).get("elements", math.nan)
        return [
            place, row.name, *(one.get("score", one.get("error", "-")) for one in (first, second)),
            last["elements"] / whole if "elements" in last else "-", last.get("latency", "-"),
        ]  # fmt: skip

    def table(self) -> str:
        """The task's table."""
        start = self.records.measured(f"{self.task.name}/dense", lambda: self.score(self.dense, timed=True))
        int8 = self.records.measured(f"{self.task.name}/int8", self.int8)
        share = f", {int8['bytes'] / (4 * start['elements']):.3f} of its bytes in float32" if "bytes" in int8 else ""
        cells: list[list[Any]] = [["1", "dense", start.get("score", "-"), "-", 1.0, "-"]]
        cells.append(["1", f"dense rounded to int8{share}", int8.get("score", int8.get("error", "-")), "-", 1.0, "-"])
        places = [(str(keep), row) for keep in self.options.keeps for row in rows(keep)]
        more = other_rows(self.task.kind, self.options.steps, self.options.dense_steps)
        places += [("own", row) for row in more]
        places = [(place, row) for place, row in places if not self.options.only or row.name in self.options.only]
        if not self.records.frozen:
            self.prepare([r for p, r in places if any(not self.records.holds(self.key(p, r, when)) for when in WHEN)])
        cells += [self.measure(place, row) for place, row in places]
        measure = "accuracy" if self.task.kind == "classification" else "perplexity"
        title = f"{self.task.name}: {measure}; {self.options.steps} steps of recovery"
        return f"\n{title}\n\n{markdown(COLUMNS, cells)}\n"


def surveyed(task: Task, records: Records, options: argparse.Namespace) -> str:
    """The table of a task, its encoder fine-tuned first."""
    dense = task.model
    if task.kind == "classification":
        dense = options.work / f"{task.name}-dense"
        if not dense.is_dir() and not records.frozen:
            settings = {"recovery": "full", "learning_rate": 1e-4, "seed": options.seed, "batch_size": DENSE_BATCH}
            in_fresh_process(tuned, task.model, dense, task, settings, None, options.dense_steps)
    return Survey(task, records, options, dense).table()


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Those whose folders are given."""
    if options.encoder and options.sst2:
        train, valid, held = (options.sst2 / f"{part}.tsv" for part in ("train", "dev", "test"))
        columns = {"data_column": "0", "data_label_column": "1"}
        yield Task("sst2", "classification", options.encoder, train, train, valid, held, columns, options.rows)
    for name in ("gpt2", "llama"):
        if folder := getattr(options, name):
            parts = ("calibration" if options.quick else "train", "calibration", "held")  # the first is the longest
            train, calibration, held = (options.texts / f"{part}.txt" for part in parts)
            yield Task(name, "causal", folder, train, calibration, calibration, held, {}, options.windows)
    if options.encoder and options.mrpc:
        train, valid = parted(options.mrpc / "train.tsv", options.work)
        columns = {"data_column": "#1 String", "data_target_column": "#2 String", "data_label_column": "Quality"}
        held = options.mrpc / "test.tsv"
        pairs = options.rows // 2  # of two sentences each
        yield Task("mrpc", "classification", options.encoder, train, train, valid, held, columns, pairs)


def parted(path: Path, work: Path) -> tuple[Path, Path]:
    """A table without every tenth row, and those rows: MRPC comes without rows to choose by."""
    head, *lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    parts = [line for i, line in enumerate(lines) if i % 10], lines[::10]
    for name, part in zip(("train", "valid"), parts, strict=True):
        (work / f"mrpc-{name}.tsv").write_text("".join([head, *part]), encoding="utf-8")
    return work / "mrpc-train.tsv", work / "mrpc-valid.tsv"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "eckart-survey", help="kept")
    for name in ("encoder", "sst2", "mrpc", "llama", "gpt2", "texts"):
        parser.add_argument(f"--{name}", type=Path, help="folder")
    parser.add_argument("--keeps", default="0.5,0.25")
    parser.add_argument("--steps", type=int, default=100, help="of recovery, the same for all rows")
    parser.add_argument("--dense-steps", type=int, default=650, help="of fine-tuning the encoder")
    parser.add_argument("--rows", type=int, default=16, help="of a step of an encoder; pairs: half as many")
    parser.add_argument("--windows", type=int, default=2, help="of a step of a decoder")
    parser.add_argument("--samples", type=int, default=2048, help="sentences to calibrate on; windows: a sixteenth")
    parser.add_argument("--tokens", type=int, default=32_768, help="of held-out text; rows: a quarter of it at most")
    parser.add_argument("--repeats", type=int, default=3, help="how often a batch is timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="rows by name, separated by semicolons")
    parser.add_argument("--show", action="store_true", help="print what was measured, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="about a quarter of an hour in place of hours")
    options = parser.parse_args()
    if (options.llama or options.gpt2) and not options.texts:
        parser.error("--texts: there is no folder of the decoders' texts")
    if options.quick:
        options.keeps, options.steps, options.dense_steps = "0.5", 3, 24
        options.tokens, options.samples, options.repeats = 512, 128, 0
        options.mrpc, options.llama = None, options.llama if not options.gpt2 else None
    options.only = options.only.split(";") if options.only else []
    options.keeps = [float(word) for word in options.keeps.split(",")]
    return options


def main() -> None:
    options = arguments()
    options.work /= "quick" if options.quick else "full"
    options.work.mkdir(parents=True, exist_ok=True)
    records = Records(options.work / "results.json", options.show)
    tables = [surveyed(task, records, options) for task in tasks(options)]
    print("".join(tables), flush=True)


if __name__ == "__main__":
    main()
