"""Read what a module of eckart assigns from its source, without importing it."""

from __future__ import annotations

import ast
import functools
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent


class SourceLiterals:
    """What a module of eckart assigns, as far as that can be read without running it.

    A class, and a call of a class of eckart, is a mapping of its literals; what it imports from eckart is looked up
    there.
    """

    def __init__(self, module: str) -> None:
        self._known: dict[str, Any] = {}
        self._imported: dict[str, str] = {}
        path = PACKAGE.joinpath(*module.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "eckart":
                self._imported |= {alias.asname or alias.name: str(node.module) for alias in node.names}
            elif isinstance(node, ast.ClassDef):
                self._known[node.name] = self._class(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                self._assign(self._known, node)

    @staticmethod
    @functools.cache
    def of(module: str) -> SourceLiterals:
        return SourceLiterals(module)

    def value(self, name: str) -> Any:
        """What the module calls `name`.

        Raises:
            ValueError: that is not a literal.
        """
        if name in self._known:
            return self._known[name]
        if name in self._imported:
            return SourceLiterals.of(self._imported[name]).value(name)
        raise ValueError(f"{name} is not a literal")

    def _class(self, node: ast.ClassDef) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for base in reversed(node.bases):
            found |= self._mapping(base)
        found["doc"] = (ast.get_docstring(node) or "").partition("\n")[0]
        for line in node.body:
            if isinstance(line, ast.Assign | ast.AnnAssign):
                self._assign(found, line)
        return found

    def _assign(self, found: dict[str, Any], node: ast.Assign | ast.AnnAssign) -> None:
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if isinstance(target, ast.Name) and node.value is not None:
            self._set(found, target.id, node.value)

    def _set(self, found: dict[str, Any], name: str, value: ast.expr) -> None:
        """Note a value; what is not a literal is not known, and hides what was inherited."""
        found.pop(name, None)
        with suppress(ValueError, TypeError, KeyError):
            found[name] = self._evaluate(value)

    def _evaluate(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return self.value(node.id)
        if isinstance(node, ast.Attribute):
            return self._mapping(node.value)[node.attr]
        if not isinstance(node, ast.Call):
            return ast.literal_eval(node)
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        given = {argument.arg: argument.value for argument in node.keywords if argument.arg is not None}
        if called == "frozenset":
            return frozenset(ast.literal_eval(node.args[0])) if node.args else frozenset()
        if called == "field":  # of a dataclass; its other defaults are made anew for each object
            return (
                frozenset()
                if ast.unparse(given["default_factory"]) == "frozenset"
                else self._evaluate(given["default"])
            )
        found = self._mapping(node.func)
        for name, value in given.items():
            self._set(found, name, value)
        return found

    def _mapping(self, node: ast.expr) -> dict[str, Any]:
        """The literals of a class that is named; none of one that is not eckart's own."""
        try:
            return dict(self.value(node.id)) if isinstance(node, ast.Name) else {}
        except (ValueError, TypeError):
            return {}
