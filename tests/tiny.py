"""Tiny checkpoints, and commands on them in processes that stop, are killed or run into trouble at a chosen moment.

Importing the libraries takes seconds, a run of a tiny model half of one: a server imports them once and forks for each
command. What a run does is counted in ticks, one before and one after each call of the functions in ``TICKING``; the
same command from the same state always ticks alike.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from architectures import scaled
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import eckart

DEMO = Path(eckart.__file__).parent / "demo" / "model"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    # What is freed goes back at once, so that memory which is watched is what is held.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
TICKING = (
    "eckart.storage.cache:Cache.drop",
    "eckart.storage.cache:Cache.put",
    "eckart.storage.journal:Journal.remove",
    "eckart.storage.journal:Journal.write",
    "eckart.storage.publish:_place",
    "eckart.storage.publish:_sync",
    "eckart.checkpoint.save:_verify",
    "eckart.compression.refit_groups:factorize",
    "eckart.compression.prepare:load_data",
    "eckart.compression.factorize:solve_site",
    "eckart.compression.refine_blocks:train_block",
    "eckart.compression.distil:train_block",
    "eckart.calibration.layerwise.runner:LayerwiseRunner.run_block_backward",
    "eckart.calibration.layerwise.runner:LayerwiseRunner.run_tail",
    "eckart.calibration.layerwise.runner:LayerwiseRunner.run_block",
    "eckart.calibration.layerwise.runner:LayerwiseRunner.capture_input",
    "os:fsync",
    "os:unlink",
    "pathlib:Path.replace",
    "shutil:rmtree",
)


def llama(**more: Any) -> LlamaForCausalLM:
    """A random model of four layers for the demo model's tokenizer."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": 8192, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return scaled(LlamaForCausalLM(LlamaConfig(**options | more)))


def place(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Path:
    """Save a model with the demo model's tokenizer."""
    model.to(dtype).save_pretrained(folder, **more)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def text(folder: Path) -> Path:
    """A file of text, the same on every machine: words drawn by Zipf's law, in lines."""
    draw = random.Random(0)
    words = [
        "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(1 + i % 4)) for i in range(800)
    ]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    lines = [" ".join(draw.choices(words, weights, k=4 + i % 9)) for i in range(1_600)]
    file = folder / "text.txt"
    file.write_text("\n".join(lines)[:60_000], encoding="utf-8")
    return file


@dataclass(frozen=True)
class Workdir:
    """Where a model and text lie.

    Attributes:
        folder: that holds both.
    """

    folder: Path

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.folder / "llama"

    @property
    def text(self) -> Path:
        """The text."""
        return self.folder / "text.txt"

    def words(self, output: Path, *more: Any) -> list[str]:
        """The command that compresses the model into a folder; what comes later overrides what came before."""
        words = [self.model, "--data", self.text, "--num-samples", 12, "--max-seq-length", 32, "--batch-size", 4]
        return list(map(str, ["compress", *words, "--output-dir", output, *more]))


def make_workdir(folder: Path) -> Workdir:
    """A workdir with a model and text."""
    place(llama(), folder / "llama")
    text(folder)
    return Workdir(folder)


def published(folder: Path) -> dict[str, Any]:
    """All files of a published folder, the report without what no two runs have in common."""
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found.pop("eckart/files.json")  # sizes: the report's changes with the digits of its seconds
    found.pop("eckart/report.html", None)  # it shows the report, seconds too
    report = json.loads(found["eckart/report.json"])
    assert report.pop("seconds")
    return found | {"eckart/report.json": report}


# -- commands in processes of their own --------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        code: of the process; minus the signal that killed or stopped it.
        said: on stdout and stderr.
        ticks: names of what was called, before (``>``) and after (``<``); none where it was killed.
        grown: bytes of memory that it took at its peak, where that was watched.
    """

    code: int
    said: str
    ticks: list[str]
    grown: int = 0

    @property
    def message(self) -> str:
        """What was said, as one line."""
        return " ".join(self.said.split())

    def __getitem__(self, name: str) -> int:
        """How often something was called."""
        assert any(known.endswith(name) for known in TICKING)
        return Counter(self.ticks)[f">{name}"]


class Server:
    """Runs commands in forked processes, until it is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, "HF_MODULES_CACHE": str(folder / "modules")},
        )

    def __call__(self, words: list[str], at: int | str | None = None, what: str = "kill", **more: Any) -> Done:
        """Run a command to its end.

        Args:
            words: of the command line, without `eckart`.
            at: the tick at which something happens, or its name, which means the first one so named; None for never.
            what: a name of :data:`TROUBLE`.
            **more: `free`: bytes of memory that it believes to be free; `at_once`: blocks whose statistics it believes
                to fit; `shard`: largest file of weights that it writes; `watch`: whether its memory is watched;
                `environ`: of the command.
        """
        return self.wait(self.start(words, at, what, **more))

    def start(self, words: list[str], at: int | str | None = None, what: str = "kill", **more: Any) -> tuple[int, Path]:
        """Start a command; for :meth:`wait`."""
        self.number += 1
        log = self.folder / str(self.number)
        pid = self._ask({"words": words, "at": at, "what": what, "log": str(log), "bare": False, **more})
        return pid, log

    def start_code(self, code: str, *words: Any, bare: bool = False, **environ: str) -> tuple[int, Path]:
        """Start Python code in a fresh process; if `bare`, nothing of eckart is imported there; for :meth:`wait`."""
        self.number += 1
        log = self.folder / str(self.number)
        job = {"code": code, "words": list(map(str, words)), "log": str(log), "bare": bare, "environ": environ}
        return self._ask(job), log

    def run_code(self, code: str, *words: Any, bare: bool = False) -> str:
        """Run Python code in a fresh process and return what it printed; it must end well."""
        done = self.wait(self.start_code(code, *words, bare=bare), bare=bare)
        assert done.code == 0, done.said
        return done.said

    def wait(self, started: tuple[int, Path], *, bare: bool = False) -> Done:
        """Wait until a process has ended, or has stopped."""
        pid, log = started
        code = self._ask({"wait": pid, "bare": bare})
        record = log.with_suffix(".json")
        return Done(code, log.read_text(), **(json.loads(record.read_text()) if record.exists() else {"ticks": []}))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # it ends with its input

    def _ask(self, question: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _full() -> None:
    """From now on every file that is opened to be written is on a full disk."""
    own = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        if set(mode) & set("wx"):
            return own(Path("/dev/full"), mode.replace("x", "w"), *args, **more)
        return own(self, mode, *args, **more)

    Path.open = opened  # type: ignore[method-assign, assignment]


def _denied() -> None:
    """From now on no file may be written."""
    own = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        if set(mode) & set("wx"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return own(self, mode, *args, **more)

    Path.open = opened  # type: ignore[method-assign, assignment]


def _no_room() -> None:
    """From now on the disk has little workdir, as far as anybody asks."""
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda _: usage._replace(free=1000)  # type: ignore[assignment]


TROUBLE: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "interrupt": _interrupt,
    "stop": _stop,
    "full": _full,
    "denied": _denied,
    "no workdir": _no_room,
}


class _Ticks:
    def __init__(self, at: int | str | None, what: str) -> None:
        self.names: list[str] = []
        self.at = at
        self.what = what

    def watch(self) -> None:
        for where in TICKING:
            module, _, path = where.partition(":")
            *parents, name = path.split(".")
            holder: Any = importlib.import_module(module)
            for parent in parents:
                holder = getattr(holder, parent)
            setattr(holder, name, self._ticking(path, getattr(holder, name)))
        if self.at == 0:
            TROUBLE[self.what]()

    def _ticking(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def ticking(*args: Any, **more: Any) -> Any:
            self._tick(f">{name}")
            result = function(*args, **more)
            self._tick(f"<{name}")
            return result

        return ticking

    def _tick(self, name: str) -> None:
        self.names.append(name)
        if self.at in (len(self.names), name):
            self.at = None
            TROUBLE[self.what]()


def run_command(job: dict[str, Any]) -> int:
    """A command in this process, which is a fork of the server."""
    from eckart.cli.app import app
    from eckart.compression import memory_estimate as estimates
    from eckart.compression import open_run as jobs
    from eckart.distributed import memory

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "free" in job:
        estimates.free_memory = lambda _: job["free"]
    if "at_once" in job:
        estimate_memory = estimates.estimate_memory
        estimates.estimate_memory = lambda *asked: replace(estimate_memory(*asked), at_once=job["at_once"])
    jobs.STREAMED_SHARD = job.get("shard", jobs.STREAMED_SHARD)
    ticks = _Ticks(job["at"], job["what"])
    ticks.watch()
    code = 0
    memory.rss = lambda: memory._kilobytes(Path("/proc/self/status"))["RssAnon"]  # files may lie in shared memory
    watched = memory.MemoryWatch(0.005)
    with watched if job.get("watch") else nullcontext():
        try:
            app(job["words"])
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    record = os.open(Path(job["log"]).with_suffix(".json"), os.O_WRONLY | os.O_CREAT)  # not by what is in trouble
    with open(record, "w") as file:
        json.dump({"ticks": ticks.names, "grown": watched.peak - watched.before}, file)
    return code
