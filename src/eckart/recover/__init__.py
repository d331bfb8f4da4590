"""Ways to make quality come back after factoring: in closed form, and by training."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from eckart.errors import UsageError
from eckart.methods import METHODS
from eckart.recover.adapter import Adapter, load_adapter, save_adapter
from eckart.recover.distil import Distil, InterLayer, NoachGoldberg
from eckart.recover.dsee import Dsee
from eckart.recover.full import Full
from eckart.recover.lora import LoRA
from eckart.recover.losparse import LoSparse, LoSparseDistilled
from eckart.recover.refit import Refit, refittable
from eckart.recover.refitting import Refitting
from eckart.recover.room import BaseRoom, ClosedForm, Context, Room
from eckart.recover.sandwich import Sandwich

RECOVERIES: dict[str, type[BaseRoom]] = {
    room.name: room
    for room in (
        Full,
        Refitting,
        Distil,
        NoachGoldberg,
        InterLayer,
        LoRA,
        LoSparse,
        LoSparseDistilled,
        Dsee,
        Sandwich,
    )
}

__all__ = [
    "RECOVERIES",
    "Adapter",
    "BaseRoom",
    "ClosedForm",
    "Context",
    "Dsee",
    "LoSparse",
    "LoSparseDistilled",
    "Refit",
    "Refitting",
    "Room",
    "Sandwich",
    "load_adapter",
    "make_room",
    "recovery_named",
    "refittable",
    "save_adapter",
]


def recovery_named(name: str) -> type[BaseRoom]:
    """The way of recovering of that name.

    Raises:
        UsageError: with the nearest spelling and the names there are.
    """
    if name in RECOVERIES:
        return RECOVERIES[name]
    if name in METHODS:
        raise UsageError(
            f"recovery {name!r} is a method, by which a model is factored: eckart compress MODEL --method {name} "
            "--output-dir DIR; what it lost then comes back by one of: " + ", ".join(RECOVERIES)
        )
    near = difflib.get_close_matches(str(name), RECOVERIES, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"recovery {name!r} is not known.{hint} Choose one of: {', '.join(RECOVERIES)}.")


def make_room(name: str, options: Mapping[str, str] | None = None) -> BaseRoom:
    """A room with its options.

    Args:
        name: of the recovery.
        options: field -> value in words.

    Raises:
        UsageError: naming an option that the room does not have, or a value of another kind.
    """
    kind = recovery_named(name)
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    values: dict[str, Any] = {}
    for key, word in (options or {}).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes: {', '.join(known) or 'none'}."
            raise UsageError(f"recovery option {key!r}: {name} does not have it; {hint}")
        values[key] = _value(key, word, hints[key])
    return kind(**values)


def _value(key: str, word: str, kind: Any) -> Any:
    kinds = getattr(kind, "__args__", (kind,))
    try:
        if bool in kinds:
            return {"true": True, "false": False, "1": True, "0": False}[word.lower()]
        found = next(convert(word) for convert in (int, float, str) if convert in kinds)
        if found - found != 0 if isinstance(found, float) else False:
            raise ValueError("not finite")
        return found
    except (KeyError, ValueError):
        names = " or ".join(part.__name__ for part in kinds if part is not type(None))
        raise UsageError(f"recovery option {key}={word!r}: give a value of the kind {names}.") from None
