"""`eckart lm-eval`: lm_eval's own command line, in a process that can load what eckart has published."""

from __future__ import annotations

import sys

import typer

from eckart.cli.console import guarded
from eckart.errors import UsageError

HANDED_ON = {
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "allow_interspersed_args": False,  # after the first word, --help too is lm_eval's
    "token_normalize_func": str,  # --model_args stays as it is
}
"""Settings of a command that reads nothing of its words itself."""


@guarded
def lm_eval(context: typer.Context) -> None:
    """Run lm_eval on a folder that eckart published: every word is handed on to lm_eval.

    `eckart lm-eval run --help` shows its options. `eckart eval DIR --lm-eval TASKS` scores the same tasks, beside the
    original.

    Example: eckart lm-eval run --model hf --model_args pretrained=smol-70 --tasks arc_easy
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise UsageError("lm-eval: lm_eval is not installed: pip install 'eckart[eval]'") from None
    import eckart  # noqa: F401  registers the checkpoint format

    before = sys.argv
    sys.argv = ["lm_eval", *context.args]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
