"""The recipe: everything that a run was asked to do, in one object that is saved with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from eckart.config import RecipeBase, checked, no_boolean
from eckart.errors import UsageError
from eckart.registry import FORMS, METHODS, RECOVERIES

DTYPES = ("float32", "bfloat16", "float16")


class Recipe(RecipeBase):
    """What a run is asked to do. Options that are None take the method's setting or a default.

    The same names are the command line's flags (`--max-seq-length`), the keys of `--config run.yaml`
    and the keyword arguments of :func:`eckart.compress`.
    """

    model: str | None = Field(None, description="Hub name or folder of the model to compress.")
    revision: str | None = Field(None, description="Revision of the model on the hub.")
    method: str = Field("eckart", description="A method by name; `eckart methods` lists them.")
    metric: str | None = Field(None, description="Another method's metric in place of this method's own.")
    form: str | None = Field(
        None, description="Stored form: pivoted, lowrank, kronecker or shared-basis. Default: the method's."
    )
    layers_per_basis: int | None = Field(
        None, ge=1, description="Adjacent layers whose weights share a basis, in form shared-basis. Default: 2."
    )
    allocation: Literal["uniform", "loss"] | None = Field(
        None, description="How ranks are chosen: the same fraction everywhere, or by predicted loss."
    )
    refit: bool | None = Field(
        None, description="Fit every site again on the compressed model's own inputs. Default: the method's."
    )
    keep: float = Field(0.7, gt=0, le=1, description="Fraction of the numbers that is stored afterwards.")
    keep_of: Literal["sites", "model"] = Field(
        "sites", description="What `keep` is a fraction of: the eligible weights, or the whole model."
    )
    embeddings: Literal["dense", "lowrank", "kronecker", "safe"] = Field(
        "dense",
        description="How token embeddings, and output heads tied to them, are stored; safe needs `eckart tune` after.",
    )
    embeddings_keep: float = Field(
        0.5, gt=0, le=1, description="Fraction of the numbers of the token embeddings that is stored afterwards."
    )
    rank_multiple: int | None = Field(None, ge=1, description="Ranks are multiples of this.")
    plan: str | None = Field(None, description="A plan.json to replay instead of allocating.")
    targets: tuple[str, ...] | None = Field(None, description="Only these modules: names, globs or regexes.")
    ignore: tuple[str, ...] | None = Field(None, description="Leave these modules alone.")
    data: str | None = Field(
        None, description="Calibration text: a file, a folder, a hub data set, 'stdlib', or 'self'."
    )
    data_config: str | None = Field(None, description="Configuration of the hub data set.")
    data_split: str = Field("train", description="Split of the hub data set.")
    data_column: str | None = Field(None, description="Column that holds the text; a number for files without header.")
    data_target_column: str | None = Field(
        None, description="Second column: of a sentence pair, or the target of an encoder-decoder."
    )
    data_label_column: str | None = Field(None, description="Column that holds the task's own labels.")
    data_revision: str | None = Field(None, description="Revision of the hub data set.")
    num_samples: int | None = Field(None, ge=1, description="Windows or sentences to calibrate on.")
    max_seq_length: int | None = Field(None, ge=2, description="Tokens of a window or sentence.")
    batch_size: int | None = Field(None, ge=1, description="Sequences run at a time.")
    curvature: Literal["auto", "sampled", "labels"] = Field(
        "auto", description="Where output gradients come from: the model's own draws, or the task's labels."
    )
    seed: int = Field(0, ge=0, description="Seed of every random draw.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Type of the stored numbers. Default: the model's."
    )
    device: str | None = Field(None, description="Device to compute on, such as cpu or cuda.")
    stream: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Work block by block, in memory that does not grow with the model's depth, and go on where a run "
        "was broken off; auto: where the model is too large to be worked on as a whole.",
    )
    cache_memory: float | None = Field(
        None, ge=0, description="GB of hidden states kept in memory between blocks; beyond it they lie in files."
    )
    trust_remote_code: bool = Field(False, description="Allow the model's own Python code to run.")

    @field_validator(
        "keep",
        "embeddings_keep",
        "rank_multiple",
        "layers_per_basis",
        "num_samples",
        "max_seq_length",
        "batch_size",
        "seed",
        "cache_memory",
        mode="before",
    )
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        return no_boolean(value)

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value or None

    @field_validator("method", "metric")
    @classmethod
    def _known_method(cls, value: str | None) -> str | None:
        if value is not None and value in RECOVERIES and value not in METHODS:
            raise ValueError(_recovered(value))
        return value if value is None else METHODS.check(value)

    @field_validator("form")
    @classmethod
    def _known_form(cls, value: str | None) -> str | None:
        return value if value is None else FORMS.check(value)

    def to_yaml(self) -> str:
        """As it is saved with the model: what was set or differs from None, without what meant nothing to the run."""
        own = self.plan is None and self.allocation is None and METHODS[self.method].allocation == "paper"
        unread = (("keep", "keep_of") if own else ()) + (("embeddings_keep",) if self.embeddings == "dense" else ())
        return self._yaml_without(unread)


def _recovered(name: str) -> str:
    """Where a recovery that was taken for a method is to be found."""
    about = RECOVERIES.about(name)
    teacher = " --teacher MODEL" if about.get("needs_teacher") else ""
    command = f"eckart tune DIR --recovery {name}{teacher} --data FILE --output-dir OUT"
    if name == "refit":
        return f"{name} recovers what a method has lost: {command}; while factors are made, any method with --{name}"
    return f"{name} is trained: {command}"


def make_recipe(options: dict[str, Any], where: str = "options") -> Recipe:
    """A checked recipe.

    Args:
        options: field -> value.
        where: what the options come from, for messages.

    Raises:
        UsageError: naming the field, what is wrong with it, and the nearest spelling of an unknown one.
    """
    recipe = checked(Recipe, options, where)
    if recipe.embeddings == "dense" and "embeddings_keep" in recipe.model_fields_set:
        raise UsageError(
            f"{where}: embeddings_keep = {recipe.embeddings_keep:g}: embeddings are kept as they are. Name a form for "
            "them: --embeddings lowrank, kronecker or safe"
        )
    return recipe


class _OneKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key written twice."""


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


_OneKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_config(path: str | Path) -> dict[str, Any]:
    """The options of a `--config` YAML file.

    Raises:
        UsageError: naming the file and line; tags, duplicate keys and anything but a mapping are refused.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_OneKeyLoader)
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
