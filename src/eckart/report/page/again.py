"""The command that makes a published folder again, and what has to be said anew for it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from eckart.data.hub import DEFAULT
from eckart.registry import FORMS, METHODS, RECOVERIES
from eckart.report.page.common import show_name

GIVEN = {"model": "MODEL", "teacher": "--teacher TEACHER", "data": "--data DATA"}
"""What a run reads -> how it is given anew."""


def make_again(found: Mapping[str, Any], name: str) -> str:
    """The command that makes a published folder again, under lines of comment on what it reads.

    A recipe holds names. What was an object in Python has none: a word in capitals stands for it. Paths are kept as
    they were given, so that those which are relative lead somewhere in the folder of the run alone.

    Args:
        found: the report that is published with it.
        name: of the folder.
    """
    recipe = found.get("recipe") or {}
    command = "tune" if found.get("kind") == "tune" else "compress"
    missing = _objects(found, recipe)
    named = {key: str(recipe[key]) for key in (*GIVEN, "eval_data", "plan") if recipe.get(key)}
    lines = [f"{_word(key)}: {_WHAT[key]}" for key in missing]
    own = _own_class(recipe)
    if own:
        lines.append(f"{own} is a class of your own: register it in Python, and call eckart.{command} there")
    if named:
        listed = ", ".join(f"{key} {show_name(value)}" for key, value in named.items())
        lines.append(f"it reads {listed}: run it in the folder where it was run, if these are relative paths")
    lines.append(f"{name}: the path of this folder from there" if named else f"{name}: the path of this folder")
    words = ["eckart", command, *(["MODEL"] if "model" in missing else [])]
    words += ["--config", f"{name}/eckart/recipe.yaml"]
    words += [word for key in missing if key != "model" for word in GIVEN[key].split()]
    words += ["--output-dir", f"{name}-again"]
    return "\n".join([*(f"# {line}" for line in lines), " ".join(shlex.quote(word) for word in words)])


_WHAT = {
    "model": "the folder or hub name of the model; it was given as an object in Python",
    "teacher": "the folder or hub name of the teacher; it was given as an object in Python",
    "data": "a file of the text or rows; they were given as objects in Python",
}


def _word(key: str) -> str:
    return GIVEN[key].rpartition(" ")[2]


def _objects(found: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """What the run read that its recipe has no name for."""
    source = (found.get("data") or {}).get("source")
    teacher = RECOVERIES.about(recipe["recovery"]) if recipe.get("recovery") in RECOVERIES else {}
    missing = {
        "model": recipe.get("model") is None,
        "teacher": teacher.get("needs_teacher", False) and recipe.get("teacher") is None,
        "data": recipe.get("data") is None and source is not None and source != DEFAULT[0],
    }
    return [key for key, objects in missing.items() if objects]


def _own_class(recipe: Mapping[str, Any]) -> str | None:
    """A method, form or recovery that no other process knows by its name."""
    for key, registry in (("method", METHODS), ("metric", METHODS), ("form", FORMS), ("recovery", RECOVERIES)):
        if recipe.get(key) is not None and not registry.is_built_in(recipe[key]):
            return f"{key} {recipe[key]}"
    return None
