"""A registry: objects by name, imported when they are first asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from eckart.errors import UsageError
from eckart.lookup.source import SourceLiterals

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Name -> object, in the order in which tables show them.

    Args:
        kind: what the objects are, in messages: "method", "form", ...
        places: name -> `module:attribute`.
    """

    def __init__(self, kind: str, places: Mapping[str, str]) -> None:
        self.kind = kind
        self._places = dict(places)
        self._added: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name in self._added:
            return self._added[name]
        module, _, attribute = self._places[name].partition(":")
        found: T = getattr(importlib.import_module(module), attribute)
        return found

    def __iter__(self) -> Iterator[str]:
        yield from self._places
        yield from self._added

    def __len__(self) -> int:
        return len(self._places) + len(self._added)

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._added

    def is_built_in(self, name: object) -> bool:
        """Whether eckart itself has an object of this name: other processes know it too."""
        return name in self._places

    def add(self, name: str, found: T) -> T:
        """Make an object of one's own known under its name, in this process; it replaces an earlier one of one's own.

        Raises:
            UsageError: eckart itself has another object of that name.
        """
        if name not in self._places:
            self._added[name] = found
        elif self[name] is not found:
            raise UsageError(
                f"{self.kind} {name!r}: eckart has another {self.kind} of this name. Give yours a name of its own."
            )
        return found

    def check(self, name: Any) -> str:
        """Return the name if it is known.

        Raises:
            UsageError: with the nearest spelling and the names there are.
        """
        if isinstance(name, str) and name in self:
            return name
        near = difflib.get_close_matches(str(name), list(self), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"{self.kind} {name!r} is not known.{hint} Choose one of: {', '.join(self)}.")

    def about(self, name: str) -> dict[str, Any]:
        """What an object says of itself, without importing it: the literals in its source.

        Of a class: its attributes and those that it inherits inside eckart. Of a call: its keyword arguments, and the
        defaults of the class that is called. `doc` is the first line of the docstring.
        """
        if name not in self._added:
            module, _, attribute = self._places[name].partition(":")
            return dict(SourceLiterals.of(module).value(attribute))
        found = self._added[name]
        kind = found if isinstance(found, type) else type(found)
        attributes: dict[str, Any] = {}
        for parent in reversed(kind.__mro__):
            attributes |= vars(parent)
        return attributes | vars(found) | {"doc": (found.__doc__ or "").strip().partition("\n")[0]}
