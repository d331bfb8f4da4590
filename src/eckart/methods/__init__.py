"""One paper a file. A new method is its file and one line in :data:`eckart.registry.METHODS`."""

from __future__ import annotations

from eckart.methods.base import Method, MetricFunction
from eckart.registry import METHODS

__all__ = ["METHODS", "Method", "MetricFunction", "method_named"]


def method_named(name: str | Method) -> Method:
    """The registered method of that name; a method object is handed through.

    Raises:
        UsageError: with the nearest spelling and the names there are.
    """
    if isinstance(name, Method):
        return name
    found: Method = METHODS[METHODS.check(name)]
    return found
