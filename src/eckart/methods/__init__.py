"""One paper a file. A new method is its file and one line in `METHODS`."""

from __future__ import annotations

import difflib

from eckart.errors import UsageError
from eckart.methods import asvd, basis_sharing, drone, eckart, fwsvd, kfac, kronecker, svd, svd_llm
from eckart.methods.base import Method, MetricFunction

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        eckart.METHOD,
        svd.METHOD,
        fwsvd.METHOD,
        fwsvd.COLUMNS,
        asvd.METHOD,
        drone.METHOD,
        svd_llm.METHOD,
        kfac.METHOD,
        basis_sharing.METHOD,
        kronecker.METHOD,
        kronecker.KNGPT2,
    )
}

__all__ = ["METHODS", "Method", "MetricFunction", "method_named"]


def method_named(name: str | Method) -> Method:
    """The registered method of that name; a method object is handed through.

    Raises:
        UsageError: with the nearest spelling and the names there are.
    """
    if isinstance(name, Method):
        return name
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(str(name), METHODS, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"method {name!r} is not known.{hint} Choose one of: {', '.join(METHODS)}.")
