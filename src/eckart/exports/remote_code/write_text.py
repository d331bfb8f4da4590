"""The generated Python file: :data:`TEMPLATE`, filled in with what occurs in a model."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import transformers
from transformers import PreTrainedModel

from eckart.errors import ModelError
from eckart.exports.remote_code.describe import WAY_OUT, Described, Replacement
from eckart.exports.remote_code.parallel import Parallel
from eckart.forms.transformers_internals import declared_ties_of

TEMPLATE = Path(__file__).with_name("modeling.py.jinja")
PREFIX = "Factored"
WIDTH = 119
"""Characters in a line of the file."""
CLASSES = {
    "linear": "nn.Linear",
    "conv1d": "make_conv1d",
    "lowrank": "LowRankLinear",
    "shared-basis": "SharedBasisLinear",
    "joint": "JointLinear",
    "pivoted-joint": "PivotedJointLinear",
    "pivoted": "PivotedLinear",
    "kronecker": "KroneckerLinear",
    "lowrank-sparse": "LowRankSparseLinear",
    "whole": "WholeLinear",
    "embedding": "FactoredEmbedding",
    "safe-embedding": "SelfAttentiveEmbedding",
    "tied-head": "TiedHead",
    "same": "Same",
    "experts": "SeparateExperts",
}
"""Form -> what makes it in the generated file."""


@dataclass(frozen=True)
class ModelNames:
    """The classes of a model, and where the generated file finds its parts.

    Attributes:
        config: class of the configuration.
        base: class of the base model.
        head: class with a head; None for a bare base model.
        base_name: attribute of the head's class that holds the base model.
        model_type: of the configuration, in the exported folder.
    """

    config: type
    base: type
    head: type | None
    base_name: str
    model_type: str

    @property
    def module(self) -> str:
        """Name of the generated file, without `.py`."""
        return f"modeling_{self.model_type}"

    @property
    def exported_config(self) -> str:
        """Name of the generated class of the configuration."""
        return PREFIX + self.config.__name__

    @property
    def exported_base(self) -> str:
        """Name of the generated class of the base model."""
        return PREFIX + self.base.__name__

    @property
    def exported(self) -> str:
        """Name of the class that the folder is of."""
        return PREFIX + (self.head or self.base).__name__

    def split(self, names: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What belongs to the base model, by names in it, and what to the rest of the model."""
        prefix = f"{self.base_name}." if self.head is not None else ""
        base = {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}
        return base, {name: value for name, value in names.items() if not name.startswith(prefix)}


def in_base(names: ModelNames, replacements: Mapping[str, Replacement]) -> dict[str, Replacement]:
    """The replacements in the base model; names of others that they use are those in the base model too."""
    prefix = f"{names.base_name}." if names.head is not None else ""
    found = {}
    for name, one in names.split(replacements)[0].items():
        of = {"of": one.arguments["of"].removeprefix(prefix)} if "of" in one.arguments else {}
        found[name] = replace(one, arguments={**one.arguments, **of})
    return found


def names_of(model: PreTrainedModel) -> ModelNames:
    """Find the classes of a model.

    Raises:
        ModelError: they are not transformers' own.
    """
    base = model.base_model
    head = None if base is model else type(model)
    names = ModelNames(
        type(model.config),
        type(base),
        head,
        model.base_model_prefix,
        f"factored_{model.config.model_type}".replace("-", "_"),
    )
    for known in (names.config, names.base, head):
        if known is not None and known.__module__.partition(".")[0] != "transformers":
            raise ModelError(
                f"{known.__name__} is not a class of transformers but of {known.__module__}: remote code is generated "
                f"on transformers' own classes, and this model brings its own. {WAY_OUT} --trust-remote-code"
            )
    return names


def write_text(names: ModelNames, described: Described, parallel: Parallel, class_plan: Mapping[str, str]) -> str:
    """Return the file's text.

    Args:
        names: the model's classes.
        described: the model.
        parallel: how it is split.
        class_plan: the plan of tensor parallelism of its configuration's class.
    """
    forms = {one.form for one in described.replacements.values()}
    _, outside = names.split(described.replacements)
    asks = _asks_for_weights(names.base)
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    functional = bool(forms & {"tied-head", "safe-embedding"})
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        config=names.config.__name__,
        base=names.base.__name__,
        head=names.head.__name__ if names.head else None,
        base_name=names.base_name,
        prefix=PREFIX,
        model_type=names.model_type,
        imports=_imports([names.config, names.base, names.head], conv1d="conv1d" in forms),
        functional=functional,
        forms=forms,
        classes={form: made for form, made in CLASSES.items() if form in forms},
        parent="Factored" if asks else "nn.Module",
        shape="        self.shape = (out_features, in_features)\n" if asks else "",
        asks_weight=asks and bool(forms & _WEIGHTS),
        base_ties=_ties_left(names.base, in_base(names, described.replacements)),
        head_ties=_ties_left(names.head, described.replacements) if names.head else None,
        has_head_modules=bool(outside),
        numbers=bool(described.head_counts),
        plan=parallel.plan if parallel.plan != dict(class_plan) else None,
        drops_plan=bool(class_plan) and parallel.plan is None,
        forgets_plan=parallel.plan_of_parts,
        unsplit=parallel.reason,
        crosses_layers=parallel.crosses_layers,
        refuses=_lines(parallel.refusal),
        uses_others=any("of" in one.arguments for one in described.replacements.values()),
        refuses_always=bool(parallel.engine_reason),
    )


def _ties_left(model: Any, replacements: Mapping[str, Replacement]) -> dict[str, str] | None:
    """The ties that a class declares, without those of weights that are not there any more; None if all are."""
    ties = declared_ties_of(model)
    gone = [f"{name}.weight" for name, one in replacements.items() if one.form in _TABLES]
    left = {
        target: source
        for target, source in ties.items()
        if not any(re.match(pattern, name) for pattern in (target, source) for name in gone)
    }
    return None if left == ties else left


def _lines(text: str) -> list[str]:
    """A text in pieces that fit into lines, with the spaces between them."""
    lines = textwrap.wrap(text, 95)
    return [f"{line} " for line in lines[:-1]] + lines[-1:]


_TABLES = {"embedding", "safe-embedding", "tied-head", "same"}
_WEIGHTS = set(CLASSES) - {"linear", "conv1d", "embedding", "safe-embedding", "tied-head", "same", "experts"}


def _asks_for_weights(base: type) -> bool:
    """Whether the code of a model asks a weight for its type or device."""
    module = sys.modules[base.__module__]
    try:
        source = inspect.getsource(module)
    except OSError:
        return True
    return re.search(r"\.weight\.(dtype|device)\b", source) is not None


def _imports(classes: list[Any], *, conv1d: bool) -> list[str]:
    """The lines that import classes: from `transformers` where they are there."""
    found: dict[str, set[str]] = {}
    for known in classes:
        if known is not None:
            public = getattr(transformers, known.__name__, None) is known
            found.setdefault("transformers" if public else known.__module__, set()).add(known.__name__)
    if conv1d:
        found.setdefault("transformers.pytorch_utils", set()).add("Conv1D")
    lines: list[str] = []
    for module, names in sorted(found.items()):
        line = f"from {module} import {', '.join(sorted(names))}"
        short = len(line) <= WIDTH
        lines += [line] if short else [f"from {module} import (", *(f"    {name}," for name in sorted(names)), ")"]
    return lines


def entries(replacements: Mapping[str, Replacement]) -> dict[str, Any]:
    """What config.json says of modules."""
    return {name: one.entry() for name, one in replacements.items()}
