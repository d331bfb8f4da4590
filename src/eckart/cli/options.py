"""The fields of a recipe as options of a command: one wording for --help, run.yaml and Python."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import typer
from pydantic import BaseModel

from eckart.compression.recipe import Recipe, make_recipe

F = TypeVar("F", bound=Callable[..., Any])

PANELS = {
    "What": ("method", "metric", "form", "layers_per_basis", "allocation", "refit", "keep", "keep_of", "embeddings",
             "embeddings_keep", "rank_multiple", "plan", "targets", "ignore", "dtype"),
    "Data": ("data", "data_config", "data_split", "data_column", "data_target_column", "data_label_column",
             "data_revision", "num_samples", "max_seq_length", "batch_size", "curvature", "seed", "data_pair_column",
             "eval_data", "eval_split", "eval_samples"),
    "Training": ("epochs", "max_steps", "learning_rate", "warmup", "weight_decay", "temperature", "save_steps"),
    "Model and machine": ("revision", "device", "stream", "cache_memory", "trust_remote_code"),
}  # fmt: skip

ARGUMENTS = ("model",)
"""Fields that are no options: MODEL is the command's argument."""


def fields(*left_out: str) -> tuple[str, ...]:
    """Names of all fields that become options, less some; a field in no panel is shown under "What"."""
    return tuple(name for name in Recipe.model_fields if name not in (*ARGUMENTS, *left_out))


def recipe_options(
    *names: str, words: Mapping[str, str] | None = None, of: type[BaseModel] = Recipe
) -> Callable[[F], F]:
    """Give a command an option for each of these fields; what is set arrives in its `**options`.

    Args:
        names: fields of :class:`eckart.Recipe`.
        words: field -> help, where an option means something else for this command.
        of: the kind of recipe.

    Returns:
        A decorator; the function it decorates takes `**options`.
    """

    def decorate(function: F) -> F:
        hints = typing.get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=_option(name, (words or {}).get(name), of),
            )
            for name in names
        ]

        @functools.wraps(function)
        def command(**values: Any) -> Any:
            given = {name: values.pop(name) for name in names}
            return function(**values, **{name: value for name, value in given.items() if value not in (None, [])})

        del command.__wrapped__  # typer would read its signature
        command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
        return command  # type: ignore[return-value]

    return decorate


def asked(content: Mapping[str, Any], config: Path | None, model: str | None, options: Mapping[str, Any]) -> Recipe:
    """The recipe of a command line: the run file first, then what stands on the line itself.

    Args:
        content: of the run file.
        config: the run file, for messages.
        model: the argument MODEL.
        options: as :func:`recipe_options` gives them.

    Raises:
        UsageError: naming the option at fault.
    """
    if config is not None:
        make_recipe(dict(content), f"--config {config}")
    given = {**options, **({"model": model} if model is not None else {})}
    return make_recipe({**content, **given}, "command line")


def _option(name: str, other: str | None = None, of: type[BaseModel] = Recipe) -> Any:
    field = of.model_fields[name]
    kind, choices = _kind(field.annotation)
    flag = "--" + name.replace("_", "-")
    words = field.description or ""
    if choices:
        words += f" One of: {', '.join(choices)}."
    if field.default not in (None, ()) and kind is not bool:
        words += f" Default: {field.default}."
    if typing.get_origin(kind) is list:
        words += " May be given several times."
    words = other or words
    panel = next((title for title, names in PANELS.items() if name in names), "What")
    declared = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    option = typer.Option(declared, help=words, rich_help_panel=panel, show_default=False)
    return Annotated[Union[kind, None], option]  # noqa: UP007  (kind is a value)


def _kind(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """The type that typer parses, and the words that are allowed; the recipe itself checks them."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return list[str], ()
    return annotation, ()
