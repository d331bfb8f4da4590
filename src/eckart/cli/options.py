"""The fields of a recipe as options of a command: one text serves `--help`, run.yaml and Python."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import typer

from eckart.config import COMMAND_LINE, RecipeBase, check_recipe

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R", bound=RecipeBase)

MAIN = "Most used"
"""Heading of the options that nearly everyone gives."""

PANELS = {
    MAIN: ("keep", "recovery", "teacher", "task", "data", "method", "effort"),
    "What": (),
    "Speed": ("optimise", "target", "rank_multiple", "objective", "speedup", "max_loss", "latency_batch_size",
              "latency_length", "profile", "stock"),
    "Data": ("data_config", "data_split", "data_column", "data_target_column",
             "data_label_column", "data_revision", "eval_data", "eval_split", "eval_samples", "num_samples",
             "refine_samples", "max_seq_length", "max_tokens", "batch_size", "curvature", "seed"),
    "Tasks of lm_eval": ("lm_eval", "limit", "num_fewshot", "include_path", "apply_chat_template"),
    "Training": ("epochs", "max_steps", "learning_rate", "warmup", "weight_decay", "temperature", "save_steps",
                 "gradient_accumulation", "gradient_checkpointing", "bf16"),
    "Model and machine": ("revision", "teacher_revision", "device", "stream", "cache_memory",
                          "trust_remote_code", "strict"),
}  # fmt: skip
"""Headings of `--help`, in order -> fields, those of the first in this order; all others stand under "What"."""

NUMBERS = {int: "<int>", float: "<float>"}
"""A kind of number -> what `--help` calls it."""

JsonOption = Annotated[
    Path | None,
    typer.Option(help="Also write all numbers to this JSON file. -: print them on standard output, and nothing else "
                 "there.", metavar="FILE", rich_help_panel="Output"),
]  # fmt: skip
PageOption = Annotated[
    Path | None,
    typer.Option("--report", help="HTML file of the report. Default: beside the file of --json, or eckart-COMMAND.html "
                 "in the current folder.", rich_help_panel="Output"),
]  # fmt: skip
NoPageOption = Annotated[bool, typer.Option("--no-report", help="Write no HTML report.", rich_help_panel="Output")]
OutputOption = Annotated[
    Path | None, typer.Option(help="Folder to publish; it must not exist yet.", rich_help_panel="Output")
]
MainOutputOption = Annotated[
    Path | None, typer.Option(help="Folder to publish; it must not exist yet.", rich_help_panel=MAIN)
]
OverwriteOption = Annotated[
    bool | None,
    typer.Option("--overwrite", help="Replace a folder that eckart published.", rich_help_panel="Output"),
]
PushOption = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="NAME", help="Also push the folder to the Hugging Face hub, as user/model.",
                 rich_help_panel="Output"),
]  # fmt: skip
PrivateOption = Annotated[
    bool, typer.Option("--private", help="With --push-to-hub: make the repository private.", rich_help_panel="Output")
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Let a fresh process read the result back and compare it before it is published.",
        rich_help_panel="Output",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(help="A YAML file of these options (data_column: text); flags override it.", rich_help_panel="Output"),
]


def options_of(kind: type[RecipeBase], *left_out: str) -> tuple[str, ...]:
    """Names of all fields of a recipe that become options; MODEL is the command's argument."""
    return tuple(name for name in kind.model_fields if name not in ("model", *left_out))


def recipe_options(
    kind: type[RecipeBase], *names: str, descriptions: Mapping[str, str] | None = None
) -> Callable[[F], F]:
    """Give a command an option for each of these fields. Options that are set arrive in its `**options`.

    Former names of fields become hidden options: :func:`eckart.config.check_recipe` refuses them by the name of today.

    Args:
        kind: the class of the recipe.
        names: its fields.
        descriptions: field -> help, where the field means something else for this command.

    Returns:
        A decorator; the function it decorates takes `**options`.
    """
    former = [name for name, now in kind.renamed.items() if now in names]

    def decorate(function: F) -> F:
        hints = typing.get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        by_panel = sorted(names, key=lambda name: ([*PANELS].index(_panel(name)), _place(name)))
        annotations = {name: _option(kind, name, (descriptions or {}).get(name)) for name in by_panel}
        annotations |= {name: Annotated[Union[str, None], typer.Option(hidden=True)] for name in former}  # noqa: UP007
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in annotations.items()
        ]

        @functools.wraps(function)
        def command(**values: Any) -> Any:
            given = {name: values.pop(name) for name in annotations}
            return function(**values, **{name: value for name, value in given.items() if value not in (None, [])})

        del command.__wrapped__  # typer would read its signature
        command.__signature__ = inspect.Signature([*added, *own])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*added, *own)}
        return command  # type: ignore[return-value]

    return decorate


def recipe_from_cli(
    kind: type[R], model: str | None, options: Mapping[str, Any], content: Mapping[str, Any] = {}, where: str = ""
) -> R:
    """The recipe of a command: the content of `--config` first, then the flags.

    Args:
        kind: the class of the recipe.
        model: the argument MODEL.
        options: as :func:`recipe_options` gives them.
        content: of the run file.
        where: the run file, for messages.

    Raises:
        UsageError: naming the option at fault.
    """
    if content:
        check_recipe(kind, content, where)
    given = {**options, **({"model": model} if model is not None else {})}
    return check_recipe(kind, kind.combine(content, given), COMMAND_LINE)


def _option(kind: type[RecipeBase], name: str, description: str | None) -> Any:
    field = kind.model_fields[name]
    parsed, choices = _parsed(field.annotation)
    flag = "--" + name.replace("_", "-")
    words = description or field.description or ""
    if description is None:
        if choices:
            words += f" One of: {', '.join(choices)}."
        if field.default not in (None, ()):
            default = ("no", "yes")[field.default] if parsed is bool else field.default
            words += f" Default: {default}."
        elif "Default: " not in words:
            words += " Default: none."
        if typing.get_origin(parsed) is list:
            words += " May be given several times."
    declared = f"{flag}/--no-{flag[2:]}" if parsed is bool else flag
    metavar = NUMBERS.get(parsed)
    if metavar is not None:  # the recipe parses it: its message names the way out
        parsed = str
    option = typer.Option(declared, help=words, metavar=metavar, rich_help_panel=_panel(name), show_default=False)
    return Annotated[Union[parsed, None], option]  # noqa: UP007  (parsed is a value)


def _panel(name: str) -> str:
    return next((title for title, names in PANELS.items() if name in names), "What")


def _place(name: str) -> int:
    """The place of a field among those that are used most."""
    return PANELS[MAIN].index(name) if name in PANELS[MAIN] else 0


def _parsed(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """The type that typer parses, and the words that are allowed; the recipe itself checks them."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return list[str], ()
    return (annotation, ()) if annotation in (bool, int, float, str) else (str, ())
