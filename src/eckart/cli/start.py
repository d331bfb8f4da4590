"""Where the command line begins: signals and streams are made safe before anything takes time to be imported."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and after `kill`: 128 and the signal's number."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end: it cleans up as after Ctrl-C."""


def main() -> None:
    """Run the command line and exit."""
    hold_standard_streams()
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        from eckart.cli.app import run

        run()
    except KeyboardInterrupt as stopped:  # outside of any command
        _leave(TERMINATED if isinstance(stopped, Terminated) else INTERRUPTED)
    except OSError as error:  # of what typer prints: help, and bad usage
        if not isinstance(error, BrokenPipeError):
            print(f"error: standard output cannot be written ({error.strerror}).", file=sys.stderr)
        _leave_quietly(0 if isinstance(error, BrokenPipeError) else 1)


def hold_standard_streams() -> None:
    """Open the null device in place of closed standard streams: else the next file opened would be one of them."""
    number = os.open(os.devnull, os.O_RDWR)
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise an interrupt; in the middle of an import, end the process at once where it holds nothing.

    Libraries that are being imported turn an interrupt into errors of their own, or stay half imported.
    """
    if _importing(frame) and not _holds_a_lock():
        _leave(TERMINATED if number == signal.SIGTERM else INTERRUPTED)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _holds_a_lock() -> bool:
    """Whether a run has begun: its output is locked then."""
    lock = sys.modules.get("eckart.storage.lock")
    return lock is not None and bool(getattr(lock, "HELD", ()))


def _leave(code: int) -> None:
    with suppress(OSError):
        os.write(2, b"interrupted; nothing was published.\n")
    os._exit(code)


def _leave_quietly(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):  # what they hold back cannot be written
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue
    os._exit(code)
