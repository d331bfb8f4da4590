"""The private names of transformers that eckart depends on: all of them are in this file, each with the reason.

They may change in any release, without notice. ``tests/test_transformers_internals.py`` names the one that is gone.
transformers itself is not imported here: these are attributes of its models, modules, parameters and configurations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
"""Environment variable: transformers then makes the tensors of a checkpoint one after the other, not in threads."""

TIES = "_tied_weights_keys"
"""Target -> source, on any module: ``save_pretrained`` leaves the targets out of the file."""


def mark_initialized(tensor: Tensor) -> None:
    """Keep ``from_pretrained`` from drawing random numbers for a tensor that no file holds."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def is_initialized(tensor: Tensor) -> bool:
    """Whether ``from_pretrained`` has filled a tensor: the proof that it was in the files."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def ignore_unexpected(model: Any, pattern: str) -> None:
    """Let ``from_pretrained`` pass over tensors of the files whose names match, without a warning."""
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | {pattern}


def expect_again(model: Any, pattern: str | None) -> None:
    """Undo :func:`ignore_unexpected`."""
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) - {pattern}


def missing_ignored(model: Any, name: str) -> bool:
    """Whether the class says that a tensor may be missing from its files."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def names_not_saved(model: Any) -> set[str]:
    """Names that ``save_pretrained`` leaves out."""
    return set(model._keys_to_ignore_on_save or ())


def keep_biases_of(model: Any, owners: set[int]) -> None:
    """Keep the loader's tying from resizing biases of modules (by id): it takes every tied module for an output head.

    It would cut the bias of a Conv1D to the number of its inputs.
    """
    own: Callable[[nn.Module, Tensor], None] = model._adjust_bias

    def adjust(module: nn.Module, source: Tensor) -> None:
        if id(module) not in owners:
            own(module, source)

    vars(model)["_adjust_bias"] = adjust


def adjust_biases_again(model: Any) -> None:
    """Undo :func:`keep_biases_of`."""
    vars(model).pop("_adjust_bias", None)


def forget_quantization(model: nn.Module) -> None:
    """Take the traces of the quantizer off a loaded model: nothing is quantized, and it may be cast and trained."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            vars(config).pop("_is_quantized", None)
            for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
                vars(module).pop(attribute, None)


def has_adapters(model: nn.Module) -> bool:
    """Whether peft adapters were added by transformers: ``save_pretrained`` then writes only these."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def weight_conversions(model: nn.Module) -> tuple[Any, ...]:
    """How the stored tensors became the model's when it was loaded; empty for a model that was built."""
    return tuple(getattr(model, "_weight_conversions", None) or ())


def model_from_config(model_class: Any, config: Any) -> Any:
    """Build a class in the type and with the attention that the configuration names, which its constructor does not."""
    return model_class._from_config(config)


def attention_of(config: Any) -> str | None:
    """Name of the attention implementation that a model uses; there is a public setter, and no getter."""
    return config._attn_implementation


def copy_attention(config: Any, source: Any) -> None:
    """Give a configuration the attention implementation of another one; ``from_dict`` drops it."""
    config._attn_implementation = source._attn_implementation


def modules_kept_in_float32(model: nn.Module, *, half: bool) -> set[str]:
    """Parts of names of modules that the class keeps in float32: always, and more of them in float16 (`half`)."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return kept | (set(getattr(model, "_keep_in_fp32_modules", None) or ()) if half else set())


def declared_ties_of(model_class: Any) -> dict[str, str]:
    """The ties that a class of models declares, target -> source."""
    return dict(getattr(model_class, TIES, None) or {})


def own_ties(module: nn.Module) -> Mapping[str, str] | None:
    """The ties that were set on this very module or model, not those of its class; None where none were set."""
    return vars(module).get(TIES)


def set_own_ties(module: nn.Module, ties: Mapping[str, str]) -> None:
    """Set the ties of one module or model."""
    setattr(module, TIES, dict(ties))


def apply_gate(experts: Any, inner: Tensor) -> Tensor:
    """Gate and activation of a module of fused experts, where its class has its own."""
    return experts._apply_gate(inner)


def auto_mapping(auto_class: Any) -> Any:
    """Class of configurations -> the class, or classes, that an Auto class of models builds; None for other classes.

    The tables behind it are public, but not which table is whose, nor what `AutoModel.register` has added.
    """
    return getattr(auto_class, "_model_mapping", None)
