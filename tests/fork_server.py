"""Forks of one process that has imported the libraries: as fresh as new processes, without their seconds of imports.

It answers jobs, one a line; see :class:`tiny.Server`. Jobs that ask for it run where nothing of eckart was imported.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  so that no fork has to

LIMIT = 120  # seconds that a job may take, on a slow machine


def run_job(job: dict[str, Any]) -> int:
    """In a fork: run Python code, or a command of eckart."""
    signal.alarm(LIMIT)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job.get("environ", {}))
    torch.set_num_threads(1)  # renews what forking broke; two threads that do so at once can fail
    if "code" not in job:
        from tiny import run_command

        return run_command(job)
    code = 0
    sys.argv = ["-c", *job["words"]]
    try:
        exec(job["code"], {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve(questions: Any, answer: Callable[[int], None], ask_other: Callable[[str], int] | None = None) -> None:
    """Answer the process id of each job, and how it ended when asked to wait.

    Args:
        questions: lines of JSON.
        answer: hands over an answer.
        ask_other: hands jobs that are not to run without eckart to the server that has imported it; None there.
    """
    for line in questions:
        job = json.loads(line)
        if ask_other is not None and not job["bare"]:
            answer(ask_other(line))
        elif "wait" in job:
            status = os.waitpid(job["wait"], os.WUNTRACED)[1]
            answer(-os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status))
        else:
            child = os.fork()
            if not child:
                code = 98
                try:
                    code = run_job(job)
                finally:
                    os._exit(code)
            answer(child)


def main() -> None:
    torch.set_num_threads(1)
    questions, ask = os.pipe()
    replies, reply = os.pipe()
    if not os.fork():
        os.close(ask)
        os.close(replies)
        import eckart.cli.app
        import eckart.compression.compare  # noqa: F401  the commands import it when they run

        sys.path.insert(0, str(Path(__file__).parent))
        import tiny  # noqa: F401

        import eckart.checkpoint.read_back as reading

        reading.run_fresh = lambda *_: {"problems": [], "compared": 0}  # seconds of imports for each command
        answers = os.fdopen(reply, "w")
        serve(os.fdopen(questions), lambda value: print(value, file=answers, flush=True))
        os._exit(0)
    os.close(questions)
    os.close(reply)
    to_other, from_other = os.fdopen(ask, "w"), os.fdopen(replies)

    def ask_other(line: str) -> int:
        print(line, file=to_other, end="", flush=True)
        return int(from_other.readline())

    serve(sys.stdin, lambda value: print(value, flush=True), ask_other)
    to_other.close()
    os.wait()  # so that its seconds are counted


if __name__ == "__main__":
    main()
