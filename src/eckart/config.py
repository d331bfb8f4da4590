"""What all recipes share: strict fields, errors that name the option, renamed options, defaults, devices and YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from eckart.errors import NumericalError, UsageError
from eckart.lookup.refused_values import describe_refusal, name_flag

if TYPE_CHECKING:
    import torch

R = TypeVar("R", bound="RecipeBase")

DEFAULT_WINDOWS = 128
"""Windows of running text that a causal model reads, where no number is given."""

DEFAULT_TEXTS = 1_024
"""Texts, or pairs of texts, that every other model reads."""

REFINED = 3
"""Times as many windows or texts, which a refinement reads: what its blocks put out for them has to be kept."""

DISTILLED = 9
"""Times as many, which a distillation reads: as many as it makes passes over the same text in its time."""

DEFAULT_TOKENS = 512
"""Tokens of a window or text; fewer where the model has fewer positions."""

DEFAULT_BATCH_SIZE = 8
"""Windows or texts that run at a time."""

LARGEST = 2**32 - 1
"""The largest whole number that an option may be: that of a seed."""

LARGEST_FILE = 1 << 20
"""Bytes of a file of options; the largest that people write have some thousand."""

UNFIT = re.compile("[\0\ud800-\udfff]")
SHOWN = 200  # characters of a value in a message

QuantizationKind = Literal["int8", "int8-dynamic", "int4"]
"""How weights can be rounded: :data:`eckart.quantization.KINDS` says what each of them is."""

STRICT = "Every fallback is an error: publish nothing that is not as it was asked for."
"""What the option is for, in every recipe that has it."""

COMMAND_LINE = "command line"
"""Where options come from that were typed: messages spell them as flags."""

INPUTS = ("model", "teacher", "data", "eval_data", "plan")
"""Fields of recipes that name what a run reads."""

LONGEST_NAME = 255
"""Bytes of a file's name on most disks; the system refuses longer ones with an error of its own."""


def is_too_long(name: str) -> bool:
    """Whether nothing can have this path, nor this name on the hub."""
    return any(len(part.encode("utf-8", "surrogatepass")) > LONGEST_NAME for part in re.split(r"[/\\]", name))


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
        if isinstance(value, str) and UNFIT.search(value):
            raise ValueError("holds characters that no name and no path can have (NUL, or half a character)")
        if isinstance(value, str) and info.field_name in (*INPUTS, "profile") and is_too_long(value):
            raise ValueError(f"is too long for a path or a name on the hub (more than {LONGEST_NAME} bytes)")
        return value

    @field_validator("*")
    @classmethod
    def _number_of_ordinary_size(cls, value: Any) -> Any:
        """Larger ones overflow in torch, numpy or the tokenizer, each with an error of its own."""
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            raise ValueError(f"must be at most {LARGEST:,}")
        return value

    @field_validator("device", check_fields=False, mode="before")
    @classmethod
    def _existing_device(cls, value: Any) -> Any:
        if value is None or value == "auto":  # the usual case needs no torch
            return "auto"
        import torch

        try:
            torch.zeros(1, device=value).item()  # a device without numbers, such as meta, cannot compute
        except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
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
        raise UsageError(f"{where}: {_shown(unknown[0])} is not an option; {hint}")
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # two fields that do not go together: the message names both
            place = "" if where == COMMAND_LINE else f"{where}: "
            raise UsageError(f"{place}{first['msg'].removeprefix('Value error, ')}") from None
        raise UsageError(_refuse_value(known, first, where)) from None


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

    Of YAML, plain values, lists and mappings are read; true and false are the only booleans, so that `stream: on` is a
    word, and numbers are decimal.

    Raises:
        UsageError: naming the file and line; tags, aliases, duplicate keys and anything but a mapping are refused.
    """
    try:
        content = yaml.load(read_text_file(path, LARGEST_FILE), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read ({error}); give the path of a YAML file.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UsageError(f"--config {path}{line}: {problem}. Only plain YAML keys and values are read.") from None
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"--config {path}: {what}. Only plain YAML keys and values are read.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: holds a {type(content).__name__}, not `option: value` lines.")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def refuse_fallbacks(notes: Sequence[str], *, strict: bool) -> None:
    """With `strict`, refuse a run that had to do something else than it was asked to, and says so in notes.

    Raises:
        NumericalError: listing them.
    """
    if strict and notes:
        listed = "".join(f"\n  - {note}" for note in notes)
        raise NumericalError(
            f"--strict: {len(notes)} things were not done as asked, so nothing was published:{listed}\nMend the model, "
            "the data or the options, or leave --strict out to accept them."
        )


def read_text_file(path: str | Path, limit: int) -> str:
    """The text of an ordinary file: a pipe that nobody writes to, or a device that never ends, would be read for ever.

    Raises:
        OSError: it is no ordinary file, larger than the limit, or cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    path = Path(path)
    if UNFIT.search(str(path)):
        raise OSError("no path can have such characters")
    if path.exists() and not path.is_dir() and not path.is_file():
        raise OSError("it is a pipe or a device, not a file")
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise OSError(f"it is larger than {limit:,} bytes")
    return raw.decode("utf-8-sig")


def _refuse_value(known: Mapping[str, Any], error: Any, where: str) -> str:
    """The option as it was written, what is wrong with its value, and what is meant instead."""
    field = ".".join(str(part) for part in error["loc"])
    name, value = field.partition(".")[0], error["input"]
    flag, typed = name_flag(name), f"{value:g}" if isinstance(value, float) else str(value)
    if where == COMMAND_LINE:
        place, again = f"{flag} {typed if len(typed) <= SHOWN else _shown(value)}", f"{flag} {{}}"
    else:
        place, again = f"{where}: {field} = {_shown(value)}", f"{name}: {{}}" if "--config" in where else f"{name}={{}}"
    message = describe_refusal(error, known[name].metadata if name == field else (), again)
    return f"{place}: {message} ({known[name].description})"


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


def _shown(value: Any) -> str:
    """A value in a message, as far as it helps."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader without what a file of options has no need of; a key that stands twice is refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            # 400 bytes of aliases stand for more values than any memory holds.
            raise yaml.MarkedYAMLError(problem=f"&{event.anchor} or *{event.anchor}: write it out", problem_mark=mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem=f"the tag {event.tag} is not read", problem_mark=mark)
        return super().compose_node(parent, index)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str) or key == "<<":
            raise yaml.MarkedYAMLError(problem=f"key {_shown(key)} is not a name", problem_mark=key_node.start_mark)
        key = key.replace("-", "_")  # spelled as the flag or as the field, it is one option
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """YAML 1.1 would read 0100 as 64, and 1:30 as 90."""
    return int(loader.construct_scalar(node))


_PLAIN = {
    "null": ("~|null|Null|NULL|", "~nN"),
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
              "-+.0123456789"),
}  # fmt: skip
"""What stands for something else than text: the core of YAML 1.2, where on, off, yes, no and dates are text."""

_StrictLoader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _PLAIN.items():
    _firsts = [*_first, ""] if _name == "null" else [*_first]
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _firsts)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _decimal)
_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
