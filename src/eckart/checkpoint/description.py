"""What ``config.json`` says of a model: forms of its modules, heads that are gone, what is shared, how it behaves."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart.adaptive import adaptive_spec, behaviors_of
from eckart.checkpoint.guard import guard_of, set_guard
from eckart.errors import CheckpointError, ModelError
from eckart.model import factored_modules, pruned_heads, separate_experts, shared_parameters, sliced_features
from eckart.quantization import KINDS, kind_of, quantized_layers

METHOD = "eckart"
WRITTEN = "eckart: run `pip install eckart`, and `import eckart` before you load this"
"""What ``config.json`` says as the method. transformers without eckart knows no such method and prints it first of all,
before it lists every weight that has another shape; so do vLLM and others. It is part of the format: what is written is
read for ever, as the bare name is.
"""
FORMAT_VERSION = 4
"""The newest that is read. Written is the oldest that holds the model: 1, 2 with shared parameters, 3 if quantized, 4
if it does less for easy inputs.
"""


class EckartConfig(QuantizationConfigMixin):
    """What ``config.json`` says about the factored modules, and about parameters that are one.

    Args:
        modules: module name -> spec, as :func:`eckart.forms.build` takes it.
        ties: target -> source, names of parameters: what the file leaves out, and whose numbers it gets.
        quantization: `kind`, one of :data:`eckart.quantization.KINDS`, and `layers`: name of a linear layer -> what
            its shape does not say of it. None for a model in floating-point numbers.
        adaptive: what :func:`eckart.adaptive.adaptive_spec` says of it; None for a model that does the same for every
            input.
        format_version: version of this description; None for the oldest that holds it.
        quant_method: ``"eckart"``, or what is written in its place.
        unknown: fields that this version does not know, which is an error.
    """

    quant_method: str  # type: ignore[assignment]

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        ties: dict[str, str] | None = None,
        quantization: dict[str, Any] | None = None,
        adaptive: dict[str, Any] | None = None,
        format_version: int | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        format_version = _oldest_version(ties, quantization, adaptive) if format_version is None else format_version
        if type(format_version) is not int or format_version < 1:
            raise CheckpointError(
                f"quantization_config.format_version in config.json is {format_version!r}, not a version "
                "number. Download config.json again."
            )
        if format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"quantization_config.format_version in config.json is {format_version}, this eckart reads "
                f"up to {FORMAT_VERSION}. Install an eckart that reads format {format_version}: pip install "
                "-U eckart"
            )
        wrong = {
            f"quant_method {quant_method!r}": not is_ours(quant_method),
            "modules": not isinstance(modules or {}, dict),
            "ties": not _are_ties(ties or {}) or (bool(ties) and format_version < 2),
            "quantization": quantization is not None and not (_is_quantization(quantization) and format_version >= 3),
            "adaptive": adaptive is not None and not (_is_adaptive(adaptive) and format_version >= 4),
        }
        if unknown or any(wrong.values()):
            what = ", ".join((*unknown, *(name for name, is_wrong in wrong.items() if is_wrong)))
            raise CheckpointError(
                f"quantization_config in config.json is not in eckart's format {format_version}: {what}. "
                "Download config.json again, or save the model again with eckart."
            )
        self.quant_method = METHOD
        self.format_version = format_version
        self.modules = dict(modules or {})
        self.ties = dict(ties or {})
        self.quantization = quantization
        self.adaptive = adaptive
        self._model: weakref.ref[PreTrainedModel] | None = None

    def follow(self, model: PreTrainedModel) -> None:
        """Describe the model as it is whenever the description is written: adapters may have changed its layers."""
        self._model = weakref.ref(model)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``config.json``: without ties, quantization and behaviors where there are none."""
        model = self._model() if self._model is not None else None
        if model is not None and getattr(model.config, "quantization_config", None) is self and not _adapted(model):
            found = described(model), shared_parameters(model), quantization_of(model), adaptive_spec(model)
            if found != (self.modules, self.ties, self.quantization, self.adaptive):
                self.modules, self.ties, self.quantization, self.adaptive = found
                self.format_version = _oldest_version(self.ties, self.quantization, self.adaptive)
        content: dict[str, Any] = {"quant_method": WRITTEN, "format_version": self.format_version,
                                   "modules": copy.deepcopy(self.modules)}  # fmt: skip
        content |= {"ties": dict(self.ties)} if self.ties else {}
        content |= {"quantization": copy.deepcopy(self.quantization)} if self.quantization else {}
        return content | ({"adaptive": copy.deepcopy(self.adaptive)} if self.adaptive else {})

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> EckartConfig:
        """Copied with its model, it describes the copy; copied alone, it stays as it is."""
        new = EckartConfig(
            copy.deepcopy(self.modules), dict(self.ties), copy.deepcopy(self.quantization),
            copy.deepcopy(self.adaptive), self.format_version,
        )  # fmt: skip
        copied = memo.get(id(self._model())) if self._model is not None else None
        if copied is not None:
            new.follow(copied)
        return new


def is_ours(quant_method: Any) -> bool:
    """Whether ``quant_method`` of a ``config.json`` is eckart's."""
    return quant_method in (METHOD, WRITTEN)


def _adapted(model: PreTrainedModel) -> bool:
    """Whether adapters stand beside factored layers, which then have other names."""
    return any(name.endswith(".base_layer") for name in factored_modules(model))


def _oldest_version(ties: Any, quantization: Any, adaptive: Any) -> int:
    """The oldest version of the format that holds them."""
    return 4 if adaptive else 3 if quantization else 2 if ties else 1


def _are_ties(ties: Any) -> bool:
    return isinstance(ties, dict) and all(isinstance(name, str) for pair in ties.items() for name in pair)


def _is_quantization(stated: Any) -> bool:
    kind, layers = (stated.get("kind"), stated.get("layers")) if isinstance(stated, dict) else (None, None)
    return kind in KINDS and isinstance(layers, dict) and all(isinstance(spec, dict) for spec in layers.values())


def _is_adaptive(stated: Any) -> bool:
    blocks, behaviors = (stated.get("blocks"), stated.get("behaviors")) if isinstance(stated, dict) else (None, None)
    named = isinstance(blocks, list) and bool(blocks) and all(isinstance(name, str) for name in blocks)
    return named and isinstance(behaviors, dict) and all(isinstance(spec, dict) for spec in behaviors.values())


def quantization_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """How a model is quantized, as the config says it; None where it is not."""
    layers = quantized_layers(model)
    return (
        {"kind": kind_of(model), "layers": {name: layer.spec() for name, layer in layers.items()}} if layers else None
    )


def attach_config(model: PreTrainedModel) -> None:
    """Make ``model.save_pretrained`` describe the model's forms and shared parameters in ``config.json``.

    To be called again after modules have been replaced.

    Args:
        model: a model with forms in place, with heads or neurons gone, quantized by eckart, with parameters that
            :func:`eckart.model.share_parameters` has made one, or with a behavior of :mod:`eckart.adaptive`.

    Raises:
        ModelError: the model has none of these, or the config ties the weight of a form.
    """
    forms, ties = factored_modules(model), shared_parameters(model)
    if not is_special(model):
        raise ModelError(
            f"{type(model).__name__} holds no factored module and shares no parameters; there is nothing to describe: "
            "use detach_config."
        )
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in forms:
        if f"{name}.weight" in tied or f"{name}.weight" in tied.values():
            raise ModelError(
                f"Module {name} is factored, but the model still ties its weight. Untie it first: set "
                "config.tie_word_embeddings = False and take it out of all_tied_weights_keys."
            )
    specs = described(model)
    set_guard(model, None if specs or quantized_layers(model) else guard_of(ties))
    description = EckartConfig(specs, ties, quantization_of(model), adaptive_spec(model))
    description.follow(model)
    model.config.quantization_config = description


def described(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What the config says of a model's modules: experts taken apart, heads and neurons that are gone, and forms."""
    specs = {name: experts.spec() for name, experts in separate_experts(model).items()}
    specs |= {name: cut.spec() for name, cut in pruned_heads(model).items()}
    specs |= {name: features.spec() for name, features in sliced_features(model).items()}
    return specs | {name: form.spec() for name, form in factored_modules(model).items()}


def is_special(model: PreTrainedModel) -> bool:
    """Whether a model holds what only a described checkpoint brings back."""
    return is_factored(model) or adaptive_spec(model) is not None


def is_factored(model: PreTrainedModel) -> bool:
    """Whether a model holds other modules or tensors than its class builds; behaviors between its blocks aside."""
    return bool(described(model) or shared_parameters(model) or quantized_layers(model))


def detach_config(model: PreTrainedModel) -> None:
    """Undo :func:`mark` on a model whose forms have been replaced by dense modules.

    Args:
        model: a model without forms and shared parameters.

    Raises:
        ModelError: some are left.
    """
    if layers := quantized_layers(model):
        raise ModelError(
            f"{len(layers)} layers are quantized ({', '.join(list(layers)[:3])}, ...). Give them floating-point "
            "numbers first: eckart.dequantize(model)."
        )
    if ties := shared_parameters(model):
        raise ModelError(
            f"{len(ties)} parameters are still those of others ({', '.join(list(ties)[:3])}, ...). Give each its own "
            "first: eckart.densify(model)."
        )
    if forms := factored_modules(model):
        raise ModelError(
            f"{len(forms)} modules are still factored ({', '.join(list(forms)[:3])}, ...). Replace them by "
            "dense ones first: eckart.densify(model)."
        )
    if sliced := sliced_features(model):
        raise ModelError(
            f"{len(sliced)} layers are smaller than their class builds them ({', '.join(list(sliced)[:3])}, ...). Make "
            "them dense first: eckart.densify(model)."
        )
    if behaviors := behaviors_of(model):
        raise ModelError(
            f"The model still has {' and '.join(behaviors)}. Take it off first: eckart.adaptive.detach(model)."
        )
    set_guard(model, None)
    if isinstance(getattr(model.config, "quantization_config", None), EckartConfig):
        del model.config.quantization_config
