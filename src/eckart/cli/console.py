"""What the commands share: where they print, how they fail, what is kept quiet."""

from __future__ import annotations

import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.text import Text

from eckart.distributed import OtherProcessError, is_main
from eckart.errors import EckartError, UsageError

WIDTH = 120
"""Columns where the output goes to no terminal."""

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
    """Print a word on progress or trouble on stderr; of several processes one does, but all print their errors."""
    if style != "red" and not is_main():
        return
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(message, style=style))


def guarded(function: F) -> F:
    """Turn what went wrong into a message and an exit code, without a traceback: 1, 2, or 130 on Ctrl-C."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except EckartError as error:
            if is_main() or not isinstance(error, OtherProcessError):
                say(f"error: {error}", "red")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            say(
                "interrupted; an output is published whole or not at all. What an unfinished run block by block has "
                "done is kept.",
                "red",
            )
            raise typer.Exit(INTERRUPTED) from None
        except (MemoryError, torch.OutOfMemoryError) as error:
            say(
                f"error: out of memory ({error or type(error).__name__}). Lower --batch-size, --max-seq-length or "
                "--num-samples, or use a machine with more.",
                "red",
            )
            raise typer.Exit(EckartError.exit_code) from error
        except OSError as error:
            say(f"error: {error}; nothing was published. Free space or choose another place, and run again.", "red")
            raise typer.Exit(EckartError.exit_code) from error
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            if logging.getLogger("eckart").level <= logging.INFO:  # --verbose
                raise
            say(
                f"error: {type(error).__name__}: {error}. Nothing was published; "
                "`eckart --verbose ...` shows where it came from.",
                "red",
            )
            raise typer.Exit(EckartError.exit_code) from error

    return run  # type: ignore[return-value]


def quieten(verbose: bool) -> None:
    """Our own log on stderr; of other libraries, errors alone."""
    import huggingface_hub
    import transformers

    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity(logging.INFO if verbose else logging.ERROR)
    transformers.logging.set_verbosity(logging.INFO if verbose else logging.ERROR)
    others = r"(torch|transformers|datasets|huggingface_hub)\b"
    warnings.filterwarnings("default" if verbose else "ignore", module=others)
    logger = logging.getLogger("eckart")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if not logger.handlers:
        logger.addHandler(_Handler())


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname.lower()
        say(f"{level}: {record.getMessage()}", "yellow" if record.levelno >= logging.WARNING else "dim")


def check_json(path: Path | None) -> None:
    """Refuse a --json file that could not be written, before any work is done.

    Raises:
        UsageError: naming the folder.
    """
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"--json {path}: there is no folder {path.absolute().parent} to write a file in.")


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write what was found, where a file was asked for; numbers that are not finite as strings."""
    if path is None or not is_main():
        return
    path.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    say(f"written to {path}", "dim")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
