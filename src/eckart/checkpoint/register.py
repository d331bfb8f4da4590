"""Register the format with transformers, and the layers with peft, as soon as these are imported by others."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Whoever calls `from_pretrained` has imported it: every model class is defined on what it holds.
WATCHED = "transformers.modeling_utils"
# Who reads a config's quantization without a model imports this alone, as lm_eval does before it loads one.
EARLIER = "transformers.quantizers"
# peft is told how an adapter stands beside a factored layer.
ADAPTERS = "peft.tuners.lora.model"
PLUGINS = {WATCHED: "eckart.checkpoint.plugin", ADAPTERS: "eckart.model.lora"}
"""Module of another library -> ours, whose `register` is called right after that one is imported."""


def register_when_imported() -> None:
    """Let ``from_pretrained`` load factored checkpoints, and peft adapt them: now where they are imported, or then.

    Neither transformers nor peft nor torch is imported here. Calling it again does no harm.
    """
    for watched in PLUGINS:
        if watched in sys.modules:
            _register(watched)
        elif not any(isinstance(finder, _Finder) and finder.watched == watched for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(watched))


def _register(watched: str) -> None:
    try:
        importlib.import_module(PLUGINS[watched]).register()
    except Exception as error:  # whatever a version of transformers may raise must not break `import transformers`
        if isinstance(error, ImportError) and _being_imported():
            sys.meta_path.insert(0, _AfterImport(watched))
            return
        if watched == ADAPTERS:
            what, lost = "its layers with peft", "adapters are put on their factors alone"
        else:
            what, lost = "its checkpoint format with transformers", "from_pretrained does not load factored checkpoints"
        warnings.warn(
            f"eckart cannot register {what} ({type(error).__name__}: {error}), so {lost}. Install versions that work "
            f"together: pip install -U eckart transformers{' peft' * (watched == ADAPTERS)}",
            RuntimeWarning,
            stacklevel=2,
        )


def _being_imported() -> bool:
    """Whether a module of eckart is only partly executed: it imported transformers, and the format needs it whole."""
    specs = [
        getattr(module, "__spec__", None) for name, module in list(sys.modules.items()) if name.startswith("eckart.")
    ]
    return any(getattr(spec, "_initializing", False) for spec in specs)


class _AfterImport(MetaPathFinder):
    """Finds nothing; registers the format at the first import after eckart's own modules are executed."""

    def __init__(self, watched: str) -> None:
        self.watched = watched

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if self in sys.meta_path and not _being_imported():
            sys.meta_path.remove(self)
            _register(self.watched)


class _Finder(MetaPathFinder):
    """Finds a watched module as the other finders do, and registers what belongs to it once it is executed."""

    def __init__(self, watched: str) -> None:
        self.watched = watched

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.watched and not (fullname == EARLIER and self.watched == WATCHED):
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self, fullname)
        return spec


class _Loader(Loader):
    """A watched module's own loader, with the registration after it."""

    def __init__(self, loader: Loader, finder: _Finder, name: str) -> None:
        self.loader, self.finder, self.name = loader, finder, name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader  # nothing of ours stays on the module
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.name == EARLIER:
            if WATCHED not in sys.modules:  # else it is what imports this one, and not executed yet
                with suppress(ImportError):
                    importlib.import_module(WATCHED)
            return
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register(self.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
