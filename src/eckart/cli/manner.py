"""How much a command says: `--quiet`, `--verbose` and `--json -`."""

from __future__ import annotations

import functools
import inspect
import os
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import typer

F = TypeVar("F", bound=Callable[..., Any])

QUIET = "Show no progress; of a published folder its path alone. Warnings and errors stay."
VERBOSE = "Show the log of every step."

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help=QUIET, rich_help_panel="Output")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help=VERBOSE, rich_help_panel="Output")]


@dataclass
class Manner:
    """How much the command that runs says.

    Attributes:
        quiet: no progress, and of what is published the path alone.
        json_alone: the results go to standard output as JSON, and nothing else does.
        warned: warnings that the command has shown; each is shown once.
    """

    quiet: bool = False
    json_alone: bool = False
    warned: set[str] = field(default_factory=set)


MANNER = Manner()


def set_quiet(quiet: bool) -> None:
    """Say whether progress is shown; bars of other libraries follow when they are next asked for."""
    MANNER.quiet = quiet


def quieten_bars() -> None:
    """Take away the bars of all libraries where nothing is to be shown, and give them back where it is."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    global _taken
    if MANNER.quiet:
        import transformers

        disable_progress_bars()
        transformers.logging.disable_progress_bar()
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when it is imported, which takes long
        _taken = True
    elif _taken:
        enable_progress_bars()
        _taken = False


_taken = False


def with_manner(command: F, set_verbose: Callable[[], None]) -> F:
    """Give a command `--quiet` and `--verbose`, which the program itself has too."""
    signature = inspect.signature(command)
    hints = typing.get_type_hints(command, include_extras=True)

    @functools.wraps(command)
    def run(*args: Any, quiet: bool = False, verbose: bool = False, **options: Any) -> Any:
        if quiet:
            set_quiet(True)
        if verbose:
            set_verbose()
        return command(*args, **options)

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", QuietOption), ("verbose", VerboseOption))
    ]
    own = [each.replace(annotation=hints.get(name, each.annotation)) for name, each in signature.parameters.items()]
    del run.__wrapped__  # typer would read its signature
    run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {**hints, "quiet": QuietOption, "verbose": VerboseOption}
    return run  # type: ignore[return-value]
