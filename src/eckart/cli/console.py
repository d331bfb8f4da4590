"""What the commands share: printing, errors and exit codes, logging, JSON files."""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer

from eckart.cli.manner import MANNER, quieten_bars, set_quiet
from eckart.cli.start import INTERRUPTED, TERMINATED, Terminated
from eckart.cli.terminal import OutputLostError, Verbatim, print_message, print_results
from eckart.distributed import is_main
from eckart.errors import LESS_MEMORY, EckartError, OtherProcessError, is_out_of_memory
from eckart.storage.publish import PUBLISHED
from eckart.storage.report_file import check_report_file, format_report, write_report

LONGEST = 600
"""Characters of an error of another library that are shown."""

STANDARD_OUTPUT = Path("-")
"""What `--json` is given for standard output."""

F = TypeVar("F", bound=Callable[..., Any])


def show(*renderables: Any) -> None:
    """Print results on stdout; of several processes one does.

    Raises:
        OutputLostError: stdout is closed or full.
    """
    if is_main() and not MANNER.json_alone:
        print_results(*renderables)


def show_published(details: Sequence[Any], folder: Any, more: str = "") -> None:
    """Print what was made, where it is, and more lines on that; with --quiet only where it is.

    Raises:
        OutputLostError: stdout is closed or full.
    """
    if MANNER.quiet:
        show(Verbatim(folder))
    else:
        show(*details, Verbatim(f"published in {folder}{more}"))


def say(message: str, style: str = "") -> None:
    """Print progress, a warning or an error on stderr.

    Of several processes one prints progress, all print their errors. With --quiet there is no progress.

    Args:
        message: a line.
        style: "yellow" for a warning, "red" for an error, anything else for progress.
    """
    if MANNER.quiet and style not in ("yellow", "red"):
        return
    if style == "red" or is_main():
        print_message(message, style)


def say_device(name: str) -> None:
    """Print which device `--device` means."""
    from eckart.config import resolve_device

    say(f"computing on {resolve_device(name)}", "dim")


def guarded(function: F) -> F:
    """Turn an exception into a message and an exit code without a traceback: 1, 2, 130 after Ctrl-C, 143 after `kill`.

    What goes wrong once a folder is published is told as that; results that cannot be printed then are no failure.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = len(PUBLISHED)
        MANNER.json_alone = False
        MANNER.warned.clear()
        try:
            _quieten_libraries()
            return function(*args, **kwargs)
        except OutputLostError as error:
            done = PUBLISHED[before:]
            if done:
                say(f"warning: {error}. {done[-1]} is published, and whole.", "yellow")
                return None
            say(f"error: {error}.", "red")
            raise typer.Exit(error.exit_code) from error
        except EckartError as error:
            if is_main() or not isinstance(error, OtherProcessError):
                say(f"error: {error}{_published_before(before)}", "red")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as stopped:
            published = _published_before(before) or "; nothing was published"
            say(
                f"interrupted{published}. A run that works block by block, and a training, resume when the same "
                "command is given again.",
                "red",
            )
            raise typer.Exit(TERMINATED if isinstance(stopped, Terminated) else INTERRUPTED) from None
        except Exception as error:
            if is_out_of_memory(error):
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                say(f"error: out of memory ({reason[:200]}). {LESS_MEMORY}{_published_before(before)}", "red")
                raise typer.Exit(EckartError.exit_code) from error
            if _verbose():
                raise
            say(f"error: {describe_unforeseen(error)}{_published_before(before) or '; nothing was published'}", "red")
            raise typer.Exit(EckartError.exit_code) from error

    return run  # type: ignore[return-value]


def describe_unforeseen(error: Exception) -> str:
    """What is known of an error that no check has foreseen: what it says, and which step of eckart it stopped."""
    if isinstance(error, OSError):
        return f"{error}. Free space, choose another place or mend its permissions, and run again"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if f"{os.sep}eckart{os.sep}" in frame.filename]
    place = f" while {own[-1].name.strip('_').replace('_', ' ')} ({Path(own[-1].filename).name})" if own else ""
    said = " ".join(str(error).split())
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
    return (
        f"{type(error).__name__}{place}: {said}. This was not foreseen: check the model's files and the options; "
        "`eckart --verbose ...` shows where it came from"
    )


def _published_before(count: int) -> str:
    done = PUBLISHED[count:]
    return f" ({done[-1]} was published before that, and is whole)" if done else ""


def set_up_logging(verbose: bool, quiet: bool = False) -> None:
    """Show eckart's own log on stderr: warnings, and every step of it where `verbose`; no progress where `quiet`."""
    set_quiet(quiet)
    others = r"(torch|transformers|datasets|huggingface_hub)\b"
    warnings.filterwarnings("default" if verbose else "ignore", module=others)
    logger = logging.getLogger("eckart")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if not logger.handlers:
        logger.addHandler(_Handler())


def _quieten_libraries() -> None:
    """Let other libraries print errors alone; called when a command runs, so that `--help` need not import them."""
    level = logging.INFO if _verbose() else logging.ERROR
    for name in ("torchao", "torch.utils._pytree"):  # what they say while they are imported concerns no user
        logging.getLogger(name).setLevel(level)
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity(level)
    transformers.logging.set_verbosity(level)
    logging.getLogger("lm_eval").setLevel(level)
    if sys.stderr is None or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    quieten_bars()


def _verbose() -> bool:
    return logging.getLogger("eckart").level <= logging.INFO


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level, message = record.levelname.lower(), record.getMessage()
        if record.levelno < logging.WARNING:
            say(f"{level}: {message}", "dim")
        elif message not in MANNER.warned:
            MANNER.warned.add(message)
            say(f"{level}: {message}", "yellow")


def check_json(path: Path | None, inputs: Sequence[Any]) -> None:
    """Refuse a --json file that cannot be written or would replace something, before any work is done.

    Raises:
        UsageError: naming the file and the way out.
    """
    if path == STANDARD_OUTPUT:
        MANNER.json_alone = True
    elif path is not None:
        check_report_file(path, inputs)


def write_json(path: Path | None, content: Mapping[str, Any], inputs: Sequence[Any]) -> None:
    """Write the results to a file, or print them, if there is a path.

    See :func:`eckart.storage.report_file.write_report`.
    """
    if path is None or not is_main():
        return
    if path == STANDARD_OUTPUT:
        print_results(Verbatim(format_report(content).rstrip()))
        return
    write_report(path, content, inputs)
    say(f"written to {path}", "dim")
