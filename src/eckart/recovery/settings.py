"""Settings of recoveries in words, as the command line and recipe files hold them, and back."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from eckart.errors import UsageError
from eckart.registry import RECOVERIES

if TYPE_CHECKING:
    from eckart.recovery.base import Recovery

PYTHON = "python:"
"""The beginning of the name of a recovery whose class is not registered: `python:MODULE.CLASS`."""


def make_recovery(name: str, options: Mapping[str, str] | None = None) -> Recovery:
    """Make a registered recovery.

    Args:
        name: of the recovery.
        options: setting -> value in words.

    Raises:
        UsageError: naming a recovery that is not known, a setting that it does not have, or a value of another kind.
    """
    kind: type[Recovery] = RECOVERIES[RECOVERIES.check(name)]
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind) if field.init]
    values: dict[str, Any] = {}
    for key, word in (options or {}).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes: {', '.join(known) or 'none'}."
            raise UsageError(f"recovery option {key!r}: {name} does not have it; {hint}")
        values[key] = _value(key, word, hints[key])
    return kind(**values)


def name_of(recovery: Recovery) -> str:
    """The name under which a recovery's class is registered; `python:MODULE.CLASS` for a class that is not.

    Raises:
        UsageError: it is not a recovery.
    """
    kind = type(recovery)
    from eckart.recovery.base import Recovery  # imports torch, as the object did

    if not isinstance(recovery, Recovery):
        what = recovery.__name__ if isinstance(recovery, type) else repr(recovery)
        raise UsageError(
            f"recovery: {what} is not an object of a class on eckart.Recovery. Pass one, such as LoRA(rank=8), "
            f"or a name: {', '.join(RECOVERIES)}"
        )
    if recovery.name in RECOVERIES and RECOVERIES[recovery.name] is kind:
        return recovery.name
    return f"{PYTHON}{kind.__module__}.{kind.__qualname__}"


def settings_of(recovery: Recovery) -> dict[str, Any]:
    """Setting -> value, of every field that the constructor takes."""
    if not is_dataclass(recovery):
        return {}
    return {field.name: getattr(recovery, field.name) for field in fields(recovery) if field.init}


def settings_in_words(recovery: Recovery) -> tuple[str, ...]:
    """`name=value` for each setting that is not None: :func:`make_recovery` makes an equal object of them."""
    found = settings_of(recovery)
    words = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in found.items()}
    return tuple(f"{key}={words[key]}" for key, value in found.items() if value is not None)


def split_patterns(words: str) -> list[str] | None:
    """Patterns that were separated by commas; None for none."""
    return [word.strip() for word in words.split(",") if word.strip()] or None


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
