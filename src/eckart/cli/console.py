"""What the commands share: printing, errors and exit codes, logging, JSON files."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from eckart.distributed import is_main
from eckart.errors import EckartError, OtherProcessError
from eckart.storage.report_file import check_report_file, write_report

WIDTH = 120
"""Columns of the output where it does not go to a terminal."""

INTERRUPTED = 130
F = TypeVar("F", bound=Callable[..., Any])


def show(*renderables: Any) -> None:
    """Print results on stdout; of several processes one does."""
    if not is_main():
        return
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(width=width, highlight=False)
    for renderable in renderables:
        console.print(Text(renderable) if isinstance(renderable, str) else renderable)


def say(message: str, style: str = "") -> None:
    """Print progress or an error on stderr; of several processes one prints progress, all print their errors."""
    if style != "red" and not is_main():
        return
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(message, style=style))


def say_device(name: str) -> None:
    """Print which device `--device` means."""
    from eckart.config import resolve_device

    say(f"computing on {resolve_device(name)}", "dim")


def guarded(function: F) -> F:
    """Turn an exception into a message and an exit code without a traceback: 1, 2, or 130 after Ctrl-C."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            _quieten_libraries()
            return function(*args, **kwargs)
        except EckartError as error:
            if is_main() or not isinstance(error, OtherProcessError):
                say(f"error: {error}", "red")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            say(
                "interrupted; nothing was published. A run that works block by block, and a training, resume when the "
                "same command is given again.",
                "red",
            )
            raise typer.Exit(INTERRUPTED) from None
        except MemoryError as error:
            _say_out_of_memory(error)
            raise typer.Exit(EckartError.exit_code) from error
        except OSError as error:
            say(f"error: {error}; nothing was published. Free space or choose another place, and run again.", "red")
            raise typer.Exit(EckartError.exit_code) from error
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's, a RuntimeError; torch may not be imported
                _say_out_of_memory(error)
                raise typer.Exit(EckartError.exit_code) from error
            if _verbose():
                raise
            say(
                f"error: {type(error).__name__}: {error}. Nothing was published; "
                "`eckart --verbose ...` shows where it came from.",
                "red",
            )
            raise typer.Exit(EckartError.exit_code) from error

    return run  # type: ignore[return-value]


def _say_out_of_memory(error: BaseException) -> None:
    say(
        f"error: out of memory ({error or type(error).__name__}). Lower --batch-size, --max-seq-length or "
        "--num-samples, or use a machine with more memory.",
        "red",
    )


def set_up_logging(verbose: bool) -> None:
    """Show eckart's own log on stderr, and every step of it where `verbose`."""
    others = r"(torch|transformers|datasets|huggingface_hub)\b"
    warnings.filterwarnings("default" if verbose else "ignore", module=others)
    logger = logging.getLogger("eckart")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if not logger.handlers:
        logger.addHandler(_Handler())


def _quieten_libraries() -> None:
    """Let other libraries print errors alone; called when a command runs, so that `--help` need not import them."""
    import huggingface_hub
    import transformers

    level = logging.INFO if _verbose() else logging.ERROR
    huggingface_hub.utils.logging.set_verbosity(level)
    transformers.logging.set_verbosity(level)
    logging.getLogger("lm_eval").setLevel(level)
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def _verbose() -> bool:
    return logging.getLogger("eckart").level <= logging.INFO


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname.lower()
        say(f"{level}: {record.getMessage()}", "yellow" if record.levelno >= logging.WARNING else "dim")


def check_json(path: Path | None, inputs: Sequence[Any]) -> None:
    """Refuse a --json file that cannot be written or would replace something, before any work is done.

    Raises:
        UsageError: naming the file and the way out.
    """
    if path is not None:
        check_report_file(path, inputs)


def write_json(path: Path | None, content: Mapping[str, Any], inputs: Sequence[Any]) -> None:
    """Write the results to a file if there is a path; see :func:`eckart.storage.report_file.write_report`."""
    if path is None or not is_main():
        return
    write_report(path, content, inputs)
    say(f"written to {path}", "dim")
