"""Packages whose names are imported when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def lazy_attributes(package: str, places: Mapping[str, tuple[str, ...]]) -> tuple[Any, Any]:
    """`__getattr__` and `__dir__` of a package whose names are imported when they are first asked for.

    Args:
        package: its `__name__`.
        places: module inside the package -> names that it defines.
    """
    where = {name: f"{package}.{module}" for module, names in places.items() for name in names}

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(where[name]), name)

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *where})

    return get, names
