"""Everything that users choose by name. A new method, form or recovery is one file and one line here.

A line says where an object is defined; it is imported when it is first asked for. What tables and `--help` show of it
is read from its source (:meth:`Registry.about`), so that they come without importing torch.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from eckart.errors import UsageError

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
            return dict(_Source.of(module).value(attribute))
        found = self._added[name]
        kind = found if isinstance(found, type) else type(found)
        attributes: dict[str, Any] = {}
        for parent in reversed(kind.__mro__):
            attributes |= vars(parent)
        return attributes | vars(found) | {"doc": (found.__doc__ or "").strip().partition("\n")[0]}


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


class _Source:
    """What a module of eckart assigns, as far as that can be read without running it.

    A class, and a call of a class of eckart, is a mapping of its literals; what it imports from eckart is looked up
    there.
    """

    def __init__(self, module: str) -> None:
        self._known: dict[str, Any] = {}
        self._imported: dict[str, str] = {}
        path = Path(__file__).parent.joinpath(*module.split(".")[1:])
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
    def of(module: str) -> _Source:
        return _Source(module)

    def value(self, name: str) -> Any:
        """What the module calls `name`.

        Raises:
            ValueError: that is no literal.
        """
        if name in self._known:
            return self._known[name]
        if name in self._imported:
            return _Source.of(self._imported[name]).value(name)
        raise ValueError(f"{name} is no literal")

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
        """Note a value; what is no literal is not known, and hides what was inherited."""
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


METHODS: Registry[Any] = Registry(
    "method",
    {
        "eckart": "eckart.methods.eckart:METHOD",
        "svd": "eckart.methods.svd:METHOD",
        "fwsvd": "eckart.methods.fwsvd:METHOD",
        "fwsvd-columns": "eckart.methods.fwsvd:COLUMNS",
        "asvd": "eckart.methods.asvd:METHOD",
        "drone": "eckart.methods.drone:METHOD",
        "svd-llm": "eckart.methods.svd_llm:METHOD",
        "kfac": "eckart.methods.kfac:METHOD",
        "basis-sharing": "eckart.methods.basis_sharing:METHOD",
        "kronecker": "eckart.methods.kronecker:METHOD",
        "kngpt2": "eckart.methods.kronecker:KNGPT2",
    },
)
"""Papers' procedures: a metric and settings for everything else (`--method`, `--metric`)."""

STATISTICS: Registry[Any] = Registry(
    "statistic",
    {
        "mean": "eckart.moments.mean:Mean",
        "gram": "eckart.moments.gram:Gram",
        "absolute": "eckart.moments.absolute:Absolute",
        "gradients": "eckart.moments.gradients:GradientGram",
        "fisher": "eckart.moments.fisher:Fisher",
    },
)
"""Sums over the calibration text that metrics read (`Method.needs`)."""

FORMS: Registry[Any] = Registry(
    "form",
    {
        "lowrank": "eckart.forms.lowrank:LowRank",
        "pivoted": "eckart.forms.pivoted:Pivoted",
        "kronecker": "eckart.forms.kronecker:Kronecker",
        "shared-basis": "eckart.forms.shared_basis:SharedBasis",
    },
)
"""How the weight of a Linear or Conv1D can be stored: what a plan can choose (`--form`)."""

EMBEDDINGS: Registry[Any] = Registry(
    "form of embeddings",
    {
        "lowrank": "eckart.forms.lowrank_embedding:LowRankEmbedding",
        "kronecker": "eckart.forms.kronecker_embedding:KroneckerEmbedding",
        "safe": "eckart.forms.safe_embedding:SafeEmbedding",
    },
)
"""How a table of token embeddings can be stored (`--embeddings`)."""

OTHER_FORMS: Registry[Any] = Registry(
    "form",
    {
        "lowrank-sparse": "eckart.forms.lowrank_sparse:LowRankSparse",
        "tied-head": "eckart.forms.tied_head:TiedHead",
    },
)
"""What recoveries and tied output layers store; no plan chooses it."""

RECOVERIES: Registry[Any] = Registry(
    "recovery",
    {
        "full": "eckart.recovery.full:Full",
        "refit": "eckart.recovery.refit:Refit",
        "distil": "eckart.recovery.distil:Distil",
        "noach-goldberg": "eckart.recovery.distil:NoachGoldberg",
        "ilkd": "eckart.recovery.distil:InterLayer",
        "lora": "eckart.recovery.lora:LoRA",
        "losparse": "eckart.recovery.losparse:LoSparse",
        "losparse-distil": "eckart.recovery.losparse:LoSparseDistilled",
        "dsee": "eckart.recovery.dsee:DSEE",
        "sandwich": "eckart.recovery.sandwich:Sandwich",
    },
)
"""Ways to make quality come back (`--recovery`)."""


def register_method(method: T) -> T:
    """Make a :class:`eckart.Method` of your own known under its `name`, in this process."""
    METHODS.add(method.name, method)  # type: ignore[attr-defined]
    return method


def register_recovery(recovery: T) -> T:
    """Make a recovery of your own, a class on :class:`eckart.Recovery`, known under its `name`, in this process."""
    RECOVERIES.add(recovery.name, recovery)  # type: ignore[attr-defined]
    return recovery
