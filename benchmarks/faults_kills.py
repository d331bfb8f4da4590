"""SIGKILL at random moments: each leaves the old folder or the new one, and the same command then finishes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults_workdir import Unfinished, Workdir, command, run, start, wait
from resume import contents as files_of

CALIBRATION = ["--num-samples", 12, "--max-seq-length", 32, "--batch-size", 4]
TOUCHING = {
    "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree",
    "ctypes.call_function", "fcntl.flock",
}  # fmt: skip
"""Audit events of Python that change files, or may."""


def jobs(workdir: Workdir) -> dict[str, list[Any]]:
    """The commands that are killed, without their output."""
    data = ["--data", workdir.text]
    compress = ["compress", workdir.causal, *data, *CALIBRATION, "--keep", 0.6]
    taught = ["tune", workdir.factored, "--teacher", workdir.causal, *data, "--max-seq-length", 32]
    return {
        "compress, in memory": [*compress, "--stream", "off"],
        "compress, block by block": [*compress, "--stream", "on"],
        "tune, training": [*taught, "--batch-size", 2, "--max-steps", 12, "--save-steps", 2],
        "tune, refit": [*taught, "--recovery", "refit", "--num-samples", 12, "--batch-size", 4],
    }


@dataclass
class Undisturbed:
    """What a command publishes when nobody disturbs it.

    Attributes:
        files: of the folder.
        seconds: that it takes.
        touches: how often it changes files.
    """

    files: dict[str, Any]
    seconds: float
    touches: int


@dataclass
class Outcome:
    """What kills of one command left.

    Attributes:
        states: of the folder: "none", "old", "new".
        resumed: reruns that went on from what was done.
        wrong: what must not be, in words.
    """

    states: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)


class _Touches:
    """Counts what changes files, in this process, and kills it at one of them."""

    def __init__(self, at: int | None) -> None:
        self.count = 0
        self.at = at
        self.on = True

    def watch(self) -> None:
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event not in TOUCHING or (event == "open" and not _writes(arguments)):
            return
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 else 0
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _counted(words: list[Any], home: Path, at: int | None = None) -> int:
    """In a fork: run a command; what it touches is counted in a file."""
    touches = _Touches(at)
    touches.watch()
    code = command(words)
    touches.on = False
    (home.parent / "touches").write_text(str(touches.count))
    return code


def undisturbed(words: list[Any], home: Path) -> Undisturbed:
    """Run a command once."""
    home.mkdir(parents=True)
    begin = time.perf_counter()
    done = wait(start(lambda: _counted([*words, "--output-dir", home / "out"], home), home / "log"), home / "log")
    seconds = time.perf_counter() - begin
    assert done.code == 0, done.said
    return Undisturbed(contents(home / "out"), seconds, int((home.parent / "touches").read_text()))


def kill_once(words: list[Any], whole: Undisturbed, old: Path | None, home: Path, chance: random.Random) -> Outcome:
    """Kill a command at a random moment, look at what it left, and let it finish.

    Args:
        words: of the command.
        whole: what it publishes undisturbed.
        old: a folder that is there already, to be overwritten.
        home: an empty folder for the output.
        chance: every second kill comes at a random time, every other at a random change of a file.
    """
    out, log = home / "out", home.parent / "log"
    words = [*words, "--output-dir", out]
    if old is not None:
        shutil.copytree(old, out)
        words.append("--overwrite")
    if chance.random() < 0.5:
        child = start(lambda: command(words), log)
        time.sleep(chance.uniform(0, whole.seconds))
        os.kill(child, signal.SIGKILL)
    else:
        at = chance.randint(1, whole.touches)
        child = start(lambda: _counted(words, home, at), log)
    wait(child, log)
    found = Outcome()
    state = _state(out, old, whole)
    if state is None or (state == "none" and old is not None):
        found.wrong.append(f"{'a mixture' if state is None else 'nothing'} is left in {home}")
        return found
    found.states[state] += 1
    again = run(words, log)
    if state == "new" and old is None:
        if again.code == 0 or "--overwrite" not in again.said:
            found.wrong.append(f"a published folder was not told as such: {again.said.strip()[-300:]}")
        again = run([*words, "--overwrite"], log)
    found.resumed += "resum" in again.said
    if again.code != 0:
        found.wrong.append(f"the same command ends with {again.code}: {again.said.strip()[-300:]}")
    elif different := _differences(contents(out), whole.files):
        found.wrong.append(f"other files after the rerun: {', '.join(different)}")
    if left := sorted({path.name for path in home.iterdir()} - {"out"}):
        found.wrong.append(f"left behind: {', '.join(left)}")
    return found


def contents(folder: Path) -> dict[str, Any]:
    """Every file of an output, without what a run that resumes says of that."""
    found = files_of(folder)
    training = found.get("eckart/report.json", {}).get("training")
    if training:
        training.pop("resumed_from", None)
    return found


def _state(out: Path, old: Path | None, whole: Undisturbed) -> str | None:
    if not out.exists():
        return "none"
    found = contents(out)
    if old is not None and found == contents(old):
        return "old"
    return "new" if found == whole.files else None


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def kill_all(workdir: Workdir, home: Path, kills: int, seed: int) -> Iterator[tuple[str, int, Outcome]]:
    """Kill every command in turn, with and without an output that it overwrites.

    Yields:
        The command, how often it was killed so far, and all that came of it so far.
    """
    chance = random.Random(seed)
    listed = [(name, words, old) for name, words in jobs(workdir).items() for old in (None, workdir.factored)]
    whole: dict[str, Undisturbed] = {}
    total: dict[str, Outcome] = {}
    count: Counter[str] = Counter()
    for number in range(kills):
        name, words, old = listed[number % len(listed)]
        if name not in whole:
            whole[name] = undisturbed(words, home / f"whole {len(whole)}")
        place = home / f"kill {number}" / "home"
        place.mkdir(parents=True)
        found = kill_once(words, whole[name], old, place, chance)
        label = f"{name}, {'overwritten' if old else 'new'}"
        kept = total.setdefault(label, Outcome())
        kept.states.update(found.states)
        kept.resumed += found.resumed
        kept.wrong += [f"kill {number}: {words}" for words in found.wrong]
        count[label] += 1
        if not found.wrong:
            shutil.rmtree(place.parent)
        yield label, count[label], kept


def unfinished_runs(words: list[Any], home: Path, parts: Sequence[float] = (0.3, 0.6, 0.9)) -> list[Unfinished]:
    """Runs of a command that were killed after a part of what they write."""
    whole = undisturbed(words, home / "whole")
    found = []
    for part in parts:
        place = home / str(part)
        place.mkdir()
        at = round(part * whole.touches)
        out = [*words, "--output-dir", place / "out"]
        wait(start(lambda out=out, place=place, at=at: _counted(out, place, at), home / "log"), home / "log")
        found.append(Unfinished(place / "out.partial", words))
    return found
