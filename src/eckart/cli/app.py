"""The command line: lists the commands and starts one of them."""

from __future__ import annotations

from typing import Annotated

import typer

from eckart import __version__
from eckart.cli.bench import bench
from eckart.cli.compare import compare
from eckart.cli.compress import compress
from eckart.cli.console import set_up_logging
from eckart.cli.demo import demo
from eckart.cli.evaluate import evaluate_folder
from eckart.cli.export import export
from eckart.cli.harness import HANDED_ON, lm_eval
from eckart.cli.inspect import inspect
from eckart.cli.manner import MANNER, QUIET, VERBOSE, with_manner
from eckart.cli.methods import methods
from eckart.cli.push import push
from eckart.cli.report import report
from eckart.cli.terminal import encode_anything
from eckart.cli.threads import wait_passively
from eckart.cli.tune import tune
from eckart.cli.verify import verify

app = typer.Typer(
    name="eckart",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda word: word.replace("_", "-"),  # --max_seq_length is --max-seq-length
    },
)

for name, command in (
    ("compress", compress),
    ("tune", tune),
    ("eval", evaluate_folder),
    ("compare", compare),
    ("bench", bench),
    ("report", report),
    ("inspect", inspect),
    ("export", export),
    ("push", push),
    ("verify", verify),
    ("methods", methods),
    ("demo", demo),
):
    app.command(name)(with_manner(command, lambda: set_up_logging(verbose=True, quiet=MANNER.quiet)))
app.command("lm-eval", context_settings=HANDED_ON)(lm_eval)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"eckart {__version__}")
        raise typer.Exit


@app.callback()
def eckart(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help=VERBOSE)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET)] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Make pretrained transformers smaller by factoring their weight matrices, and measure what it cost."""
    set_up_logging(verbose, quiet)


def run() -> None:
    """Run the command line and exit; :func:`eckart.cli.start.main` does."""
    wait_passively()  # before torch is imported, which commands do
    encode_anything()
    app()
