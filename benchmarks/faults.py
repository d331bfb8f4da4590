"""Kills at random moments, and inputs that are almost right.

    python benchmarks/faults.py --kills 200 --fuzz 10000

Kills: `compress`, in memory and block by block, and `tune`, by training and in closed form, each with a new output and
with one that it overwrites, get SIGKILL at a random time or at a random change of a file. What is left must be the old
folder or the new one; the same command must then end with the files of an undisturbed run, and leave nothing else.

Inputs: run files, plans, configurations, indexes, headers of weights, journals and rows of data, in which something was
changed at random, each read by a command. It must accept the input or refuse it with one message: no traceback, no
hang, nothing written outside its output, and a journal must lead to the bits that an undisturbed run writes.
`--only NUMBER` reads one input again and keeps its folder.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from common import markdown
from faults_fuzz import GOOD, Fuzzed, fuzz, make_case
from faults_kills import Outcome, jobs, kill_all, undisturbed, unfinished_runs
from faults_workdir import Workdir, make_workdir, run, warm_up

EVERY = 500
"""Inputs between two words of progress."""


def print_kills(workdir: Workdir, home: Path, kills: int, seed: int) -> int:
    """Kill, and print what came of it; returns how much was wrong."""
    total: dict[str, tuple[int, Outcome]] = {}
    for label, count, found in kill_all(workdir, home, kills, seed):
        total[label] = count, found
        done = sum(number for number, _ in total.values())
        if done % 20 == 0:
            print(f"{done} kills, {sum(len(found.wrong) for _, found in total.values())} wrong", flush=True)
    rows = [
        [label, count, *(found.states[state] for state in ("none", "old", "new")), found.resumed, len(found.wrong)]
        for label, (count, found) in total.items()
    ]
    print("\n" + markdown(["command, output", "kills", "none left", "old left", "new left", "resumed", "wrong"], rows))
    wrong = [f"{label}: {words}" for label, (_, found) in total.items() for words in found.wrong]
    print("\n".join(wrong))
    return len(wrong)


def print_fuzz(workdir: Workdir, home: Path, count: int, seed: int, log: Path | None) -> int:
    """Read inputs, and print what came of them; returns how many were neither accepted nor refused."""
    found: list[Fuzzed] = []
    for one in fuzz(workdir, home, list(range(count)), seed):
        found.append(one)
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps(vars(one)) + "\n")
        if one.outcome not in GOOD:
            print(f"{one.number}: {one.kind}: {one.outcome}: {' '.join(one.said.split())[-300:]}", flush=True)
        if len(found) % EVERY == 0:
            print(f"{len(found)} inputs: {dict(Counter(one.outcome for one in found))}", flush=True)
    outcomes = [*GOOD, *sorted({one.outcome for one in found} - set(GOOD))]
    rows = []
    for kind in dict.fromkeys(one.kind for one in found):
        own = [one for one in found if one.kind == kind]
        counts = Counter(one.outcome for one in own)
        named = sum(one.named for one in own if one.outcome == "refused")
        rows.append([kind, len(own), *(counts[name] for name in outcomes), named, f"{max(o.seconds for o in own):.1f}"])
    columns = ["input", "number", *outcomes, "refusals that name the file", "longest, s"]
    print("\n" + markdown(columns, sorted(rows)))
    return sum(one.outcome not in GOOD for one in found)


def show_one(workdir: Workdir, home: Path, number: int, seed: int) -> None:
    """Read one input again, and print all that is said."""
    case = make_case(workdir, home / str(number), number, seed)
    words = [*case.words, *(("--output-dir", home / str(number) / "result" / "out") if case.publishes else ())]
    print("eckart", *words)
    done = run(words)
    print(done.said[-5000:])
    print(f"exit {done.code}; changed: {case.file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--fuzz", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="read the input of this number, and nothing else")
    parser.add_argument("--log", type=Path, help="a file that gets a line of JSON for each input")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="eckart-faults-"))
    os.environ["TMPDIR"] = str(home)
    tempfile.tempdir = str(home / "tmp")
    (home / "tmp").mkdir()
    warm_up()
    workdir = make_workdir(home)
    wrong = 0
    if options.only is not None or options.fuzz:
        words = jobs(workdir)["compress, block by block"]
        workdir.expected = undisturbed(words, home / "undisturbed").files
        workdir.unfinished = unfinished_runs(words, home / "unfinished")
    if options.only is not None:
        show_one(workdir, home / "inputs", options.only, options.seed)
        return
    if options.kills:
        begin = time.perf_counter()
        wrong += print_kills(workdir, home / "kills", options.kills, options.seed)
        print(f"{time.perf_counter() - begin:.0f} s\n", flush=True)
    if options.fuzz:
        begin = time.perf_counter()
        wrong += print_fuzz(workdir, home / "inputs", options.fuzz, options.seed, options.log)
        print(f"{time.perf_counter() - begin:.0f} s")
    print(f"\n{wrong} wrong" + (f"; what they left is in {home}" if wrong else ""))
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
