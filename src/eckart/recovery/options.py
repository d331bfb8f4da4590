"""A recovery from its name and its options in words, as the command line gives them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

from eckart.errors import UsageError
from eckart.registry import METHODS, RECOVERIES

if TYPE_CHECKING:
    from eckart.recovery.base import Recovery


def recovery_named(name: str) -> type[Recovery]:
    """The way of recovering of that name.

    Raises:
        UsageError: with the nearest spelling and the names there are.
    """
    if name in METHODS and name not in RECOVERIES:
        raise UsageError(
            f"recovery {name!r} is a method, by which a model is factored: eckart compress MODEL --method {name} "
            "--output-dir DIR; what it lost then comes back by one of: " + ", ".join(RECOVERIES)
        )
    found: type[Recovery] = RECOVERIES[RECOVERIES.check(name)]
    return found


def make_recovery(name: str, options: Mapping[str, str] | None = None) -> Recovery:
    """A recovery with its options.

    Args:
        name: of the recovery.
        options: field -> value in words.

    Raises:
        UsageError: naming an option that the recovery does not have, or a value of another kind.
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
