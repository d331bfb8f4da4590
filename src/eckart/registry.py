"""Everything that users choose by name. A new method, form or recovery is one file and one line here.

A line says where an object is defined; it is imported when it is first asked for. What tables and `--help` show of it
is read from its source (:meth:`Registry.about`), so that they come without importing torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
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
        """What the source says of an object, in literals: attributes of a class, or arguments of a call.

        Of a class, `doc` is the first line of its docstring; attributes of a parent in the same file are its own too.
        """
        if name in self._added:
            found = self._added[name]
            return {"doc": (found.__doc__ or "").strip().partition("\n")[0], **vars(type(found)), **vars(found)}
        module, _, attribute = self._places[name].partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        with open(spec.origin, encoding="utf-8") as file:
            return _literals(ast.parse(file.read()), attribute)


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


def _literals(tree: ast.Module, name: str) -> dict[str, Any]:
    """Literal attributes of the class, or keyword arguments of the call, that a module calls `name`."""
    known: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            own = {"doc": (ast.get_docstring(node) or "").partition("\n")[0]}
            for base in node.bases:
                own = {**known.get(base.id if isinstance(base, ast.Name) else "", {}), **own}
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
                    own |= _literal(line.target.id, line.value)
            known[node.name] = own
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            call = node.value
            if isinstance(call, ast.Call):
                own = {}
                for argument in call.keywords:
                    own |= _literal(argument.arg or "", argument.value)
                known[node.targets[0].id] = own
    return dict(known[name])


def _literal(key: str, value: ast.expr) -> dict[str, Any]:
    if isinstance(value, ast.Call) and value.args:  # frozenset({...})
        value = value.args[0]
    try:
        return {key: ast.literal_eval(value)}
    except ValueError:
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
        "lowrank": "eckart.forms.embedding:LowRankEmbedding",
        "kronecker": "eckart.forms.embedding:KroneckerEmbedding",
        "safe": "eckart.forms.embedding:SafeEmbedding",
    },
)
"""How a table of token embeddings can be stored (`--embeddings`)."""

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
