"""What all recipes share: strict fields, errors that name the option, renamed options, defaults, devices and YAML."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from eckart.errors import UsageError

if TYPE_CHECKING:
    import torch

R = TypeVar("R", bound="RecipeBase")

DEFAULT_WINDOWS = 128
"""Windows of running text that a causal model reads, where no number is given."""

DEFAULT_TEXTS = 1_024
"""Texts, or pairs of texts, that every other model reads."""

DEFAULT_TOKENS = 512
"""Tokens of a window or text; fewer where the model has fewer positions."""

DEFAULT_BATCH_SIZE = 8
"""Windows or texts that run at a time."""

INPUTS = ("model", "teacher", "data", "eval_data", "plan")
"""Fields of recipes that name what a run reads."""


def default_samples(kind: str) -> int:
    """How many windows or texts are read where no number is given; `kind` is what the model reads."""
    return DEFAULT_WINDOWS if kind == "causal" else DEFAULT_TEXTS


class RecipeBase(BaseModel):
    """The base of a recipe: frozen, unknown fields and booleans for numbers are refused, the device must exist.

    Class attributes:
        renamed: former name of a field -> its name today; the former name is refused with the one of today.
        renamed_values: field -> former value -> value of today.
    """

    model_config = ConfigDict(extra="forbid", strict=False, frozen=True, allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: Any) -> Any:
        """Pydantic reads True as 1: `keep: yes` in a YAML file would mean 1."""
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
            raise ValueError("must be a number, not a boolean")
        return value

    @field_validator("device", check_fields=False, mode="before")
    @classmethod
    def _existing_device(cls, value: Any) -> Any:
        if value is None or value == "auto":  # the usual case needs no torch
            return "auto"
        import torch

        try:
            torch.empty(0, device=value)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"no such device here ({reason}); use auto, cpu, or a device that torch finds") from None
        return str(value)

    @classmethod
    def combine(cls, content: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a recipe or run file, and those that were given apart from it, which win."""
        return {**content, **options}

    @property
    def inputs(self) -> list[str]:
        """What a run by this recipe reads: paths and names, which no output may replace."""
        named = (getattr(self, name, None) for name in INPUTS)
        return [value for value in named if value is not None]

    def to_yaml(self) -> str:
        """The recipe as it is saved with the model; fields that are None are left out."""
        return self._yaml_without(())

    def _yaml_without(self, left_out: Collection[str]) -> str:
        content = {k: v for k, v in self.model_dump(mode="json").items() if v is not None and k not in left_out}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def check_recipe(kind: type[R], options: Mapping[str, Any], where: str = "options") -> R:
    """Build a recipe from options.

    Args:
        kind: the class of the recipe.
        options: field -> value.
        where: where the options come from ("command line", "eckart.compress"); messages start with it.

    Raises:
        UsageError: naming the field and what is wrong with it; for an unknown field, the nearest spelling; for a
            field or value that was renamed, the name of today.
    """
    _refuse_former_names(kind, options, where)
    known = kind.model_fields
    unknown = [key for key in options if key not in known]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}."
        raise UsageError(f"{where}: {unknown[0]!r} is not an option; {hint}")
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # two fields that do not go together: the message names both
            raise UsageError(f"{where}: {message}") from None
        field = ".".join(str(part) for part in first["loc"])
        help_text = known[field.split(".")[0]].description
        raise UsageError(f"{where}: {field} = {first['input']!r}: {message} ({help_text})") from None


def merge_recipe(kind: type[R], recipe: R | None, options: Mapping[str, Any], where: str) -> R:
    """Build a recipe from another one and from options; the options win.

    Args:
        kind: the class of the recipe.
        recipe: None for an empty one.
        options: field -> value.
        where: as for :func:`check_recipe`.

    Raises:
        UsageError: as :func:`check_recipe`; or `recipe` is of another class.
    """
    if recipe is None:
        return check_recipe(kind, options, where)
    if not isinstance(recipe, kind):
        raise UsageError(f"{where}: recipe is a {type(recipe).__name__}; pass a {kind.__name__}, or its fields alone.")
    return check_recipe(kind, kind.combine(recipe.model_dump(exclude_unset=True), options), where)


def resolve_device(name: str | None = "auto") -> torch.device:
    """The device of that name; "auto" is a CUDA GPU where there is one, and the CPU elsewhere."""
    import torch

    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def read_config(path: str | Path) -> dict[str, Any]:
    """Read the options of a `--config` YAML file.

    Raises:
        UsageError: naming the file and line; tags, duplicate keys and anything but a mapping are refused.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read ({error}); give the path of a YAML file.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UsageError(f"--config {path}{line}: {problem}. Only plain YAML keys and values are read.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: holds a {type(content).__name__}, not `option: value` lines.")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _refuse_former_names(kind: type[RecipeBase], options: Mapping[str, Any], where: str) -> None:
    for former, name in kind.renamed.items():
        if former in options:
            raise UsageError(f"{where}: {former!r} is now called {name!r}; write {_spell(name, options[former])}")
    for field, values in kind.renamed_values.items():
        given = options.get(field)
        if isinstance(given, str) and given in values:
            now = values[given]
            raise UsageError(f"{where}: {field} = {given!r} is now called {now!r}; write {_spell(field, now)}")


def _spell(field: str, value: Any) -> str:
    """An option as it is written in a file, and on the command line."""
    return f"{field}: {value} (--{field.replace('_', '-')} {value})"


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader; a key that stands twice is refused."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is not a name", problem_mark=key_node.start_mark)
        key = key.replace("-", "_")  # spelled as the flag or as the field, it is one option
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
