"""Which of transformers' Auto classes load a model class: transformers' own mappings, read backwards."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from eckart.forms.transformers_internals import auto_mapping

FIRST = (
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
)
"""Of several that load a class, these come first, in this order."""

LAST = ("AutoModelForMultimodalLM", "AutoModelForPreTraining")
"""These say little of a class that others load too."""


def exact_auto_classes(config: PretrainedConfig, model_class: type | str) -> tuple[str, ...]:
    """Names of the Auto classes that give back this very class for this configuration, the most telling first.

    Args:
        config: of the model, as it is saved.
        model_class: the class, or its name; empty for a class that no Auto class loads.
    """
    found = [name for name, mapping in _mappings().items() if _is_among(model_class, _looked_up(mapping, config))]
    return _sorted(found, _name(model_class))


def own_auto_classes(config: PretrainedConfig, name: str) -> tuple[str, ...]:
    """Auto classes that load a class of this name from the model's own Python code, by `auto_map` of its config."""
    named = getattr(config, "auto_map", None)
    entries = named.items() if isinstance(named, dict) else ()
    return _sorted(
        [auto for auto, entry in entries if auto in _mappings() and str(entry).rpartition(".")[2] == name], name
    )


def head_classes(config: PretrainedConfig, model_class: type | str) -> tuple[str, ...]:
    """Auto classes whose kind of head a class has: its own, or those of the nearest class that it is made from.

    What neither transformers nor the model's own code registers is known by transformers' rule for names alone: what
    `AutoModelForX` loads is called `...ForX`.

    Args:
        config: of the model.
        model_class: the class, or its name.
    """
    for known in model_class.__mro__ if isinstance(model_class, type) else (model_class,):
        if found := exact_auto_classes(config, known):
            return found
    name = _name(model_class)
    return own_auto_classes(config, name) or tuple(auto for auto in _mappings() if _is_named_after(name, auto))


def _sorted(autos: list[str], name: str) -> tuple[str, ...]:
    def place(auto: str) -> tuple[bool, int, str]:
        others = len(FIRST) + (1 + LAST.index(auto) if auto in LAST else 0)
        return not _is_named_after(name, auto), FIRST.index(auto) if auto in FIRST else others, auto

    return tuple(sorted(autos, key=place))


def _is_named_after(name: str, auto: str) -> bool:
    return auto != "AutoModel" and name.endswith(auto.removeprefix("AutoModel"))


def _name(model_class: type | str) -> str:
    return model_class.__name__ if isinstance(model_class, type) else model_class


def _looked_up(mapping: Any, config: PretrainedConfig) -> Any:
    try:
        return mapping.get(type(config), None)
    except ValueError:  # a table of transformers names a class that it has not
        return None


def _is_among(model_class: type | str, known: Any) -> bool:
    classes = known if isinstance(known, tuple | list) else (known,)
    if isinstance(model_class, str):
        return any(getattr(one, "__name__", None) == model_class for one in classes)
    return any(one is model_class for one in classes)


@cache
def _mappings() -> dict[str, Any]:
    """Auto class of models -> its mapping, of configuration classes to model classes."""
    names = [name for name in modeling_auto.__all__ if name.startswith("AutoModel")]
    mappings = {name: auto_mapping(getattr(modeling_auto, name)) for name in names}
    return {name: mapping for name, mapping in mappings.items() if mapping is not None}
