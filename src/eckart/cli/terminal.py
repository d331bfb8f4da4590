"""Printing on streams that may be closed, full, read by nobody, or a terminal that obeys what is printed on it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.text import Text

from eckart.errors import EckartError

WIDTH = 120
"""Columns of the output where it does not go to a terminal."""

# A checkpoint's names and a table's cells come from others: an escape sequence among them would be obeyed by the
# terminal, a mark of writing direction would show another text than there is, half a character cannot be encoded.
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class OutputLostError(EckartError):
    """Results that could not be printed."""


class Verbatim(str):
    """Lines that are copied from the terminal, such as code or a path: they are never wrapped."""


def make_visible(text: str) -> str:
    r"""A text with `\x1b` in place of every character that a terminal obeys instead of showing it."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def print_results(*renderables: Any) -> None:
    """Print on stdout.

    Raises:
        OutputLostError: it is closed or full; nothing is written to it any more. A pipe that its reader has closed is
            no error: whoever closed it has read enough.
    """
    if sys.stdout is None:
        raise OutputLostError(_lost("it is closed"))
    try:
        console = _Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
        with _bars_aside(sys.stdout):
            for renderable in renderables:
                shown = Text(renderable) if isinstance(renderable, str) else renderable
                console.print(_Visible(shown), soft_wrap=isinstance(renderable, Verbatim))
    except BrokenPipeError:
        _discard(sys.stdout)
    except (OSError, ValueError) as error:  # ValueError: of a stream that was closed in this process
        if isinstance(error, ValueError) and not getattr(sys.stdout, "closed", False):
            raise
        _discard(sys.stdout)
        raise OutputLostError(_lost(getattr(error, "strerror", None) or str(error))) from error


def print_message(message: str, style: str = "") -> None:
    """Print on stderr; where it cannot be printed the work goes on without."""
    if sys.stderr is None:
        return
    try:
        with _bars_aside(sys.stderr):
            _Console(stderr=True, highlight=False, soft_wrap=True).print(Text(make_visible(message), style=style))
    except (OSError, ValueError):
        _discard(sys.stderr)


def encode_anything() -> None:
    r"""Let stdout and stderr print what their encoding does not have as `\u2026`, not as an error."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich's own would leave the process in the middle of anything, with exit code 1 and without a word."""
        error = sys.exc_info()[1]
        assert error is not None
        raise error


class _Visible:
    """A table or text as it is rendered, with its words made visible."""

    def __init__(self, renderable: Any) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._segments(console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self.renderable)

    def _segments(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for text, style, control in console.render(self.renderable, options):
            yield Segment(text if control else make_visible(text), style, control)


def _bars_aside(stream: Any) -> AbstractContextManager[None]:
    """Take the bars of a terminal away while something is printed there; nothing where nobody has drawn any."""
    bars = sys.modules.get("tqdm")
    return bars.tqdm.external_write_mode(file=stream) if bars is not None else nullcontext()


def _lost(why: str) -> str:
    return (
        f"the results cannot be printed on standard output ({why}). Let it go to a terminal or to a file on a disk "
        "that has space"
    )


def _discard(stream: Any) -> None:
    """Let a stream lead nowhere: what it holds back would fail again when the process ends."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):  # a stream that is not a file of the system
        return
