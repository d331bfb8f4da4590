"""Inputs that are almost right, one after the other: each is accepted, or refused with one message."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from faults_inputs import KINDS, Case
from faults_kills import contents
from faults_workdir import MEMORY, Workdir, command, send_streams_to

LIMIT = 60
"""Seconds that an input may take: this long is a hang."""

TOGETHER = 100
"""Inputs that one process reads."""

GOOD = ("accepted", "refused")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGING = {
    "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),),
    "os.chmod": ((0, 2),), "os.truncate": ((0, None),), "shutil.rmtree": ((0, 1),), "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
}  # fmt: skip
"""Audit events that change files: which of their arguments is the path, and which the open folder that it lies in."""


@dataclass(frozen=True)
class Fuzzed:
    """What came of one input.

    Attributes:
        number: which makes the same input again.
        kind: of input.
        outcome: "accepted", "refused", or what must not be.
        seconds: that it took.
        said: the end of what was said.
        named: whether a refusal names the file that was changed.
    """

    number: int
    kind: str
    outcome: str
    seconds: float
    said: str
    named: bool = True


def fuzz(workdir: Workdir, home: Path, numbers: list[int], seed: int) -> Iterator[Fuzzed]:
    """Read inputs in processes that are watched, and killed when they hang."""
    waiting = list(numbers)
    while waiting:
        answers, answer = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(answers)
                _read_many(workdir, home, waiting[:TOGETHER], seed, answer)
            finally:
                os._exit(0)
        os.close(answer)
        got = yield from _watch(child, answers, waiting[:TOGETHER], seed)
        os.close(answers)
        waiting = waiting[got:]


def _watch(child: int, answers: int, numbers: list[int], seed: int) -> Iterator[Fuzzed]:
    """Hand on what a process answers; returns how many inputs are done."""
    got, rest = 0, b""
    while got < len(numbers):
        ready, _, _ = select.select([answers], [], [], LIMIT + 5)
        piece = os.read(answers, 1 << 16) if ready else b""
        if not piece:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            yield Fuzzed(numbers[got], _kind(numbers[got], seed), "died" if ready else "hang", LIMIT, f"exit {code}")
            return got + 1
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            got += 1
            yield Fuzzed(**json.loads(line))
    os.waitpid(child, 0)
    return got


def _chance(number: int, seed: int) -> random.Random:
    return random.Random(f"{seed}:{number}")


def _kind(number: int, seed: int) -> str:
    names = list(KINDS)
    return _chance(number, seed).choices(names, [KINDS[name][1] for name in names])[0]


def make_case(workdir: Workdir, home: Path, number: int, seed: int) -> Case:
    """The input of a number."""
    chance = _chance(number, seed)
    names = list(KINDS)
    kind = chance.choices(names, [KINDS[name][1] for name in names])[0]
    (home / "result").mkdir(parents=True)
    return KINDS[kind][0](workdir, home, chance)


class _Writes:
    """Places outside of an input's output that are written to."""

    def __init__(self) -> None:
        self.home: Path | None = None
        self.allowed: tuple[str, ...] = ()
        self.found: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.home is None:
            return
        if event == "open":
            flags = arguments[2] if len(arguments) > 2 else 0
            paths: Any = ((0, None),) if isinstance(flags, int) and flags & WRITING else ()
        else:
            paths = CHANGING.get(event, ())
        for place, folder in paths:
            path = arguments[place]
            if isinstance(path, int):
                continue
            home = arguments[folder] if folder is not None and folder < len(arguments) else None
            start = os.readlink(f"/proc/self/fd/{home}") if isinstance(home, int) and home >= 0 else os.getcwd()
            whole = os.path.normpath(os.path.join(start, os.fsdecode(path)))
            if not whole.startswith(self.allowed):
                self.found.append(f"{event} {whole}")


def _read_many(workdir: Workdir, home: Path, numbers: list[int], seed: int, answer: int) -> None:
    """In a fork: read inputs, and answer with a line for each."""
    writes = _Writes()
    sys.addaudithook(writes)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    for number in numbers:
        place = home / str(number)
        shutil.rmtree(place, ignore_errors=True)
        case = make_case(workdir, place, number, seed)
        log = home / "log"
        send_streams_to(log)
        found = asdict(_read_one(workdir, case, place, number, log, writes))
        os.write(answer, json.dumps(found).encode() + b"\n")
        if found["outcome"] in GOOD:
            shutil.rmtree(place)


def _read_one(workdir: Workdir, case: Case, home: Path, number: int, log: Path, writes: _Writes) -> Fuzzed:
    out = home / "result" / "out"
    before = _listing(home)
    signal.alarm(LIMIT)
    writes.found = []
    writes.allowed = (str(home / "result"), os.environ["TMPDIR"] + "/tmp", "/dev/", "/proc/")
    writes.home = home
    begin = time.process_time()
    words = [*case.words, *(("--output-dir", out) if case.publishes else ())]
    code = command(words)
    writes.home = None
    signal.alarm(0)
    seconds = time.process_time() - begin
    sys.stdout.flush()
    sys.stderr.flush()
    said = log.read_text(encoding="utf-8", errors="replace")
    outcome = _outcome(code, said, out, case)
    if outcome == "accepted" and case.same and contents(out) != workdir.expected:
        outcome = "other bits"
    if writes.found or before != _listing(home):
        outcome, said = "writes elsewhere", f"{said}\n{writes.found[:5]}"
    messages = re.findall(r"^(?:error: |Usage: )(?s:.*)", said, re.M)
    end = (messages[-1] if messages else said)[-600:]
    return Fuzzed(number, case.kind, outcome, seconds, end, outcome != "refused" or case.file.name in end)


def _outcome(code: int, said: str, out: Path, case: Case) -> str:
    if "Traceback (most" in said or code not in (0, 1, 2):
        return "traceback"
    if "was not foreseen" in said or "Free space, choose another place" in said:
        return "unforeseen"
    if "error: out of memory" in said:
        return "memory"
    if code == 0:
        return "nothing published" if case.publishes and not out.is_dir() else "accepted"
    if out.exists():
        return "published and refused"
    return "refused" if len(re.findall(r"^error: |^Usage: ", said, re.M)) == 1 else "no clear message"


def _listing(home: Path) -> list[tuple[str, int, int]]:
    """What lies in an input's folder, apart from its output."""
    found = [path for path in sorted(home.rglob("*")) if not path.is_relative_to(home / "result")]
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in found if path.is_file()]
