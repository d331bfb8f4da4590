"""The lines of Python that load a saved model, in the class that it was saved in."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eckart.checkpoint.description import is_special
from eckart.data.auto_classes import exact_auto_classes, own_auto_classes
from eckart.storage.layout import read_json, sentence_modules

SENTENCE_TASKS = {
    "SentenceTransformer": "sentence-similarity",
    "CrossEncoder": "text-ranking",
    "SparseEncoder": "feature-extraction",
    "MultiVectorEncoder": "sentence-similarity",
}
"""Class of sentence-transformers -> what the hub calls its task."""

OTHER_NAMES = {"ColBERT": "MultiVectorEncoder"}
"""What PyLate writes as the class -> the class of sentence-transformers that reads it."""

NEEDS_ECKART = "import eckart  # registers the checkpoint format with transformers"
INSTALLED_BY = {"sentence_transformers": "sentence-transformers"}
"""Module that eckart does not install -> the package of it, which the lines name: who has none gets no bare error."""

REMOTE_MODULES = "transformers_modules"
"""The package that transformers imports a model's own code into."""


@dataclass(frozen=True)
class Loading:
    """How a saved model is loaded.

    Attributes:
        name: the class, or the function.
        module: what it is imported from; "" for a class that only its owner can import.
        method: which is called on it; "" where it is called itself.
        arguments: by name, after the folder.
        library: as the hub calls it.
        task: what the hub calls the task (`pipeline_tag`); None where it has no name for it.
        needs_eckart: whether eckart must be imported first.
    """

    name: str = "AutoModel"
    module: str = "transformers"
    method: str = "from_pretrained"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    library: str = "transformers"
    task: str | None = None
    needs_eckart: bool = True

    def lines(self, folder: str | Path) -> str:
        """The lines that load a folder, or a name on the hub, into `model`."""
        words = [json.dumps(str(folder), ensure_ascii=False)]
        words += [f"{key}={_literal(value)}" for key, value in self.arguments.items()]
        if self.module == "eckart":
            return f"import eckart\n\nmodel = eckart.{self.name}({', '.join(words)})"
        where = f"from {self.module} import {self.name}" if self.module else f"# {self.name}: your own class"
        where += f"  # pip install {INSTALLED_BY[self.module]}" if self.module in INSTALLED_BY else ""
        called = f"{self.name}.{self.method}" if self.method else self.name
        lines = f"{where}\n\nmodel = {called}({', '.join(words)})"
        return f"{NEEDS_ECKART}\n{lines}" if self.needs_eckart else lines

    def with_arguments(self, **more: Any) -> Loading:
        """The same with further arguments, such as `backend="onnx"`."""
        return replace(self, arguments={**self.arguments, **more})


def find_loading(
    model: PreTrainedModel,
    folder: str | Path | None = None,
    *,
    needs_eckart: bool | None = None,
) -> Loading:
    """Find the class that gives back a model as it was saved.

    A class of sentence-transformers where the folder is one's; else the Auto class that loads this very class, by
    transformers' own mappings or by the `auto_map` of its configuration; else the class itself; else
    :func:`eckart.load`.

    Args:
        model: that is saved.
        folder: where it was saved, or what it came from: of sentence-transformers' files there it is decided whose
            model it is.
        needs_eckart: whether eckart must be imported first; None for what the model holds.
    """
    needs = is_special(model) if needs_eckart is None else needs_eckart
    config, kind = model.config, type(model)
    module = kind.__module__
    remote = own_auto_classes(config, kind.__name__) if not module.startswith("transformers.") else ()
    trust: dict[str, Any] = {"trust_remote_code": True} if remote else {}
    sentence = _sentence_class(model, Path(folder) if folder is not None else None)
    if sentence is not None:
        return Loading(
            sentence, "sentence_transformers", "", trust, "sentence-transformers", SENTENCE_TASKS[sentence], needs
        )
    exact = () if module.partition(".")[0] == REMOTE_MODULES else exact_auto_classes(config, kind)
    if auto := (remote or exact):
        return Loading(auto[0], arguments=trust, task=_task_of(auto[0], model), needs_eckart=needs)
    if module.partition(".")[0] == REMOTE_MODULES:  # its own code, and nothing names the class
        return Loading("load", "eckart", "", {"trust_remote_code": True}, needs_eckart=True)
    return Loading(kind.__name__, _importable_from(kind), needs_eckart=needs)


def _sentence_class(model: PreTrainedModel, folder: Path | None) -> str | None:
    """The class of sentence-transformers that a folder was saved with; None where it is not one of its folders."""
    if folder is not None and sentence_modules(folder) is not None:
        file = folder / "config_sentence_transformers.json"
        said = read_json(file).get("model_type") if file.is_file() else None
        name = OTHER_NAMES.get(str(said), str(said))
        return name if name in SENTENCE_TASKS else "SentenceTransformer"
    # A CrossEncoder had no file of its own before version 6: what it adds stands in the model's configuration.
    return "CrossEncoder" if isinstance(getattr(model.config, "sentence_transformers", None), dict) else None


def _task_of(auto: str, model: PreTrainedModel) -> str | None:
    """What the hub calls the task of models that an Auto class loads: the first pipeline of transformers for it."""
    from transformers.pipelines import SUPPORTED_TASKS

    tasks: Mapping[str, Any] = SUPPORTED_TASKS
    found = [task for task, about in tasks.items() if auto in {one.__name__ for one in about["pt"]}]
    if auto == "AutoModel":
        reads = "image" if model.main_input_name == "pixel_values" else "text"
        found = [task for task in found if tasks[task]["type"] == reads]
    return found[0] if found else None


def _importable_from(kind: type) -> str:
    """The module that a class is imported from; "" for a class of a script or inside a function."""
    import transformers

    if getattr(transformers, kind.__name__, None) is kind:
        return "transformers"
    inside = getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind
    return kind.__module__ if inside and kind.__module__ != "__main__" else ""


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
