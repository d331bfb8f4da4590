"""A run that is killed at random moments and started again, against one that nobody disturbed.

    python benchmarks/resume.py --model FOLDER --methods drone,eckart

The two outputs must be the same in every bit, but for the times that they report. Every fifth time a byte in the last
entry of the journal is flipped as well before the run goes on: it must notice, and do that part anew. Without
arguments: the bundled demo model, offline.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import COMPRESS, Ran, markdown, watched

from eckart.demo.steps import MODEL

FLIPPED = 5
"""Every so many kills a byte is flipped."""

STAGES = ("text", "solved", "stored", "refitted")
"""Of a journal, in the order in which a run comes to them."""


def entries(partial: Path) -> dict[str, list[Path]]:
    """What a journal holds: stage -> files of its entries, in the order written."""
    return {stage: sorted((partial / "entries" / stage).glob("*.safetensors")) for stage in STAGES}


def flip(partial: Path, chance: random.Random) -> str | None:
    """Flip a byte in the file of the journal's last entry; returns the file's name, None if it has none."""
    written = [path for paths in entries(partial).values() for path in paths]
    if not written:
        return None
    path = max(written, key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 0xFF
    path.write_bytes(content)
    return f"{path.parent.name}/{path.name}"


def contents(folder: Path) -> dict[str, Any]:
    """Every file of an output: its bytes, without the times that it reports."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == "eckart/report.json":
            found[name] = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k != "seconds"}
        elif path.suffix == ".md":
            found[name] = re.sub(r"[\d.,]+ s(econds)?\b", "", path.read_text(encoding="utf-8"))
        elif name not in (
            "eckart/files.json",
            "eckart/report.html",
        ):  # sizes: the report's changes with the digits of its seconds
            found[name] = path.read_bytes()
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Files that differ between two outputs, or are in one of them alone."""
    first, second = contents(one), contents(other)
    return [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]


class Moment:
    """Comes a while after a number of entries has been written: in any part of a run, however fast the machine is."""

    def __init__(self, partial: Path, count: int, seconds: float) -> None:
        self.partial = partial
        self.count = count
        self.seconds = seconds
        self.seen = 0
        self.since = time.perf_counter()

    def __call__(self) -> bool:
        now = sum(map(len, entries(self.partial).values()))
        if now > self.seen:
            self.seen, self.since = now, time.perf_counter()
        return self.seen > self.count or (self.seen == self.count and time.perf_counter() - self.since >= self.seconds)


def run(
    model: str, method: str, options: argparse.Namespace, output: Path, kill: Callable[[], bool] = lambda: False
) -> Ran:
    """`eckart compress`, block by block."""
    asked = {
        "method": method, "keep": options.keep, "data": options.data, "stream": "on",
        "num-samples": options.num_samples, "max-seq-length": options.max_seq_length,
        "batch-size": options.batch_size, "output-dir": output,
    }  # fmt: skip
    command = [*COMPRESS, model, *(word for name, value in asked.items() for word in (f"--{name}", value))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else None
    return watched(command, output.with_name("log"), environment=environment, kill=kill)


def disturbed(
    number: int, method: str, options: argparse.Namespace, home: Path, undisturbed: Ran, total: int,
    chance: random.Random, flips: bool,
) -> tuple[list[str], bool]:  # fmt: skip
    """Kill one run and start it again.

    Returns:
        Its row of the table, and whether a byte was flipped.
    """
    output = home / str(number) / "output"
    partial = output.with_name("output.partial")
    shutil.rmtree(output.parent, ignore_errors=True)
    output.parent.mkdir()
    count = chance.randint(0, total)
    # Before the first entry there is the start of the program, half of a short run.
    moment = Moment(partial, count, chance.uniform(0, undisturbed.seconds / (total if count else 2)))
    killed = run(options.model, method, options, output, moment)
    done = entries(partial)
    counts = [str(len(done[stage])) for stage in STAGES[1:]]
    flipped = None
    if output.is_dir():  # nothing is left to do, and the same command would be refused
        counts = ["published"] * len(counts)
        noticed, saved = "-", "-"
    else:
        flipped = flip(partial, chance) if flips else None
        again = run(options.model, method, options, output)
        if again.code != 0:
            return [method, f"{killed.seconds:.2f}", *counts, flipped or "-", f"failed: {again.last_words}", "-"], False
        noticed = "-" if flipped is None else flipped if "dropped" in again.output else f"{flipped}, not noticed"
        saved = f"{undisturbed.seconds - again.seconds:.1f}"
    different = differences(home / "undisturbed" / "output", output)
    same = "same" if not different else f"differ: {', '.join(different)}"
    if partial.exists():
        same += ", and the journal is still there"
    if not different:
        shutil.rmtree(output.parent)
    return [method, f"{killed.seconds:.2f}", *counts, noticed, same, saved], flipped is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--methods", default="drone,eckart")
    parser.add_argument("--kills", type=int, default=20, help="of each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--max-seq-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--work", type=Path, help="a folder that keeps the outputs that differ; otherwise none is kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="eckart-resume-") as temporary:
        work: Path = options.work or Path(temporary)
        rows: list[list[str]] = []
        chance = random.Random(options.seed)
        for method in options.methods.split(","):
            home = work / method
            shutil.rmtree(home, ignore_errors=True)
            (home / "undisturbed").mkdir(parents=True)
            output = home / "undisturbed" / "output"
            watch = Moment(output.with_name("output.partial"), sys.maxsize, 0)
            whole = run(options.model, method, options, output, watch)
            if whole.code != 0:
                print(f"{method}, undisturbed: failed: {whole.last_words}", flush=True)
                continue
            print(f"{method}, undisturbed: {whole.seconds:.1f} s, {watch.seen} entries", flush=True)
            owed = False
            for number in range(1, options.kills + 1):
                # A run that was killed too early to have a journal passes its flip on to the next.
                owed = owed or number % FLIPPED == 0
                row, flipped = disturbed(number, method, options, home, whole, watch.seen, chance, owed)
                owed = owed and not flipped
                rows.append(row)
                print(f"{number}: {', '.join(row)}", flush=True)
    columns = ["method", "killed after s", *STAGES[1:], "byte flipped in", "output", "s saved"]
    print(
        f"\n{Path(options.model).name}, {options.num_samples} x {options.max_seq_length} tokens, keep {options.keep}; "
        f"windows in the journal when killed; torch {torch.__version__}, threads: {torch.get_num_threads()}.\n"
    )
    print(markdown(columns, rows))
    print(f"\n{sum(row[-2].startswith('same') for row in rows)} of {len(rows)} outputs are the same, bit for bit.")


if __name__ == "__main__":
    main()
