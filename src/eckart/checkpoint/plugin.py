"""The checkpoint format inside transformers: importing this module registers it.

``config.json`` says ``quantization_config: {quant_method: "eckart", format_version, modules, ties}``; transformers
asks the quantizer registered under that name to put the forms in place before it loads the weights.
Nothing is quantised, and the loaded model is left an ordinary one that can be cast, trained and saved.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart.checkpoint.guard import guard_of, set_guard
from eckart.errors import CheckpointError, ModelError, UsageError
from eckart.forms import Factored, FactoredLinear, build
from eckart.model import (
    Experts,
    HeadCut,
    cut_heads,
    experts_apart,
    factored_modules,
    fused_experts,
    owner_of,
    share,
    shared_parameters,
    ties_of,
    ties_of_factored,
)
from eckart.model.experts import FORM as EXPERTS
from eckart.model.heads import FORM as HEADS

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

METHOD = "eckart"
FORMAT_VERSION = 2
"""The newest that is read. Written is 1 where nothing is shared, so that what has no need of 2 loads everywhere."""


class EckartConfig(QuantizationConfigMixin):
    """What ``config.json`` says about the factored modules, and about parameters that are one.

    Args:
        modules: module name -> spec, as :func:`eckart.forms.build` takes it.
        ties: target -> source, names of parameters: what the file leaves out, and whose numbers it gets.
        format_version: version of this description; None for the oldest that holds it.
        quant_method: always ``"eckart"``.
        unknown: fields that this version does not know, which is an error.
    """

    quant_method: str  # type: ignore[assignment]

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        ties: dict[str, str] | None = None,
        format_version: int | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        format_version = (2 if ties else 1) if format_version is None else format_version
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
            f"quant_method {quant_method!r}": quant_method != METHOD,
            "modules": not isinstance(modules or {}, dict),
            "ties": not _are_ties(ties or {}) or (bool(ties) and format_version < 2),
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

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``config.json``: without ties where there are none."""
        content: dict[str, Any] = super().to_dict()
        return content if self.ties else {key: value for key, value in content.items() if key != "ties"}


def _are_ties(ties: Any) -> bool:
    return isinstance(ties, dict) and all(isinstance(name, str) for pair in ties.items() for name in pair)


class EckartQuantizer(HfQuantizer):
    """Builds the forms on the empty model, and takes itself off the loaded one."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._handles: list[RemovableHandle] = []
        self._pattern: str | None = None
        self._ties: dict[str, str] = {}
        self._guarded: str | None = None

    def is_serializable(self) -> bool:
        """Saving is always possible."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Training is always possible."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        assert isinstance(self.quantization_config, EckartConfig)
        factored = {}
        guarded: list[str] = []  # names of the empty tensors
        specs = dict(self.quantization_config.modules)
        for name in [name for name, spec in specs.items() if isinstance(spec, dict) and spec.get("form") == EXPERTS]:
            del specs[name]
            guarded += self._take_apart(model, name)
        for name in [name for name, spec in specs.items() if isinstance(spec, dict) and spec.get("form") == HEADS]:
            _cut(model, name, specs.pop(name))
        for name, spec in specs.items():
            place = _locate(model, name)
            if place is not None:
                factored[place] = _form(name, spec, model.get_submodule(place))
        before = ties_of(model)
        for place, form in factored.items():
            # Otherwise the loader would expect the guard, the empty tensor under the dense weight's name.
            self._handles.append(form.register_state_dict_post_hook(_without_guard))
            model.set_submodule(place, form)
        # Another class's head has a guard as well.
        guarded += [f"{name}.weight" for name in dict.fromkeys((*factored, *specs))]
        if factored:
            ties_of_factored(model, before, tie=False)
            tied = model.all_tied_weights_keys
            half = next((n for n in factored if f"{n}.weight" in tied or f"{n}.weight" in tied.values()), None)
            if half is not None:
                raise CheckpointError(
                    f"Module {half} is factored, but the config ties its weight (tie_word_embeddings). Set "
                    "tie_word_embeddings to false in config.json."
                )
        self._ties = _located_ties(model, self.quantization_config.ties)
        if not self.quantization_config.modules and (guard := guard_of(self.quantization_config.ties)) is not None:
            guarded.append(guard)
            self._expect_guard(model, guard)
        self._tie_on_loading(model)
        if guarded:
            prefix = re.escape(model.base_model_prefix)
            names = "|".join(re.escape(name.removeprefix(f"{model.base_model_prefix}.")) for name in guarded)
            self._pattern = rf"^(?:{prefix}\.)?(?:{names})$"
            ignored = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = ignored | {self._pattern}

    def _take_apart(self, model: PreTrainedModel, name: str) -> list[str]:
        """Put single experts where the model's class has fused ones; returns the names of their guards."""
        place = _locate(model, name)
        if place is None:
            return []
        if place not in dict(fused_experts(model)):
            raise CheckpointError(
                f"Module {name} in quantization_config of config.json are experts taken apart, but "
                f"{type(model.get_submodule(place)).__name__} there holds none that eckart can take apart. Load it "
                "with the transformers that it was saved with, or a newer eckart: pip install -U eckart"
            )
        experts = Experts(model.get_submodule(place))
        self._handles.append(experts.register_state_dict_post_hook(_without_guard))
        model.set_submodule(place, experts)
        return [f"{place}.{guard}" for guard in experts.guards]

    def _expect_guard(self, model: PreTrainedModel, guard: str) -> None:
        """Let the loader neither expect numbers under a guarded name nor tie it; that is done afterwards."""
        place = next((target for target in self._ties if _same_place(model, target, guard)), None)
        if place is None:  # of another head
            return
        owner, key = owner_of(model, place)
        owner._parameters[key]._is_hf_initialized = True

        def hide(_: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            state.pop(prefix + key, None)

        self._handles.append(owner.register_state_dict_post_hook(hide))
        self._guarded = place

    def _tie_on_loading(self, model: PreTrainedModel) -> None:
        """Tell the loader, and whoever places the model on devices, what is one."""
        if not self._ties:
            return
        model.all_tied_weights_keys = model.all_tied_weights_keys | {
            target: source for target, source in self._ties.items() if target != self._guarded
        }
        owners = {id(owner_of(model, target)[0]) for target in self._ties}
        own = model._adjust_bias

        def adjust(module: nn.Module, source: Tensor) -> None:
            # It takes every tied module for a head, and would cut the bias of a Conv1D to its inputs.
            if id(module) not in owners:
                own(module, source)

        vars(model)["_adjust_bias"] = adjust

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self._ties:
            vars(model).pop("_adjust_bias", None)
            model.all_tied_weights_keys = {
                target: source for target, source in model.all_tied_weights_keys.items() if target not in self._ties
            }
            share(model, self._ties)
        for handle in self._handles:
            handle.remove()
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored - {self._pattern}
        lost = [
            f"{name}.{key}"
            for name, form in factored_modules(model).items()
            for key, tensor in (*form.named_parameters(), *form.named_buffers())
            # transformers marks what it has filled; on the meta device it stands for a file on disk.
            if not getattr(tensor, "_is_hf_initialized", False) and not tensor.is_meta
        ]
        if lost:
            raise CheckpointError(
                f"{len(lost)} tensors of factored modules are missing from the weights of "
                f"{model.config.name_or_path}: {', '.join(lost)}. Without them the model would be filled "
                "with random numbers. Download the folder again."
            )
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
                for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
                    module.__dict__.pop(attribute, None)
        mark(model)
        return model


def mark(model: PreTrainedModel) -> None:
    """Make ``model.save_pretrained`` describe the model's forms and shared parameters in ``config.json``.

    To be called again after modules have been replaced.

    Args:
        model: a model with forms in place, with heads gone, or with parameters that :func:`eckart.model.share` has made
            one.

    Raises:
        ModelError: the model has none of these, or the config ties the weight of a form.
    """
    forms, ties = factored_modules(model), shared_parameters(model)
    if not is_special(model):
        raise ModelError(
            f"{type(model).__name__} holds no factored module and shares no parameters; there is nothing to describe: "
            "use unmark."
        )
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in forms:
        if f"{name}.weight" in tied or f"{name}.weight" in tied.values():
            raise ModelError(
                f"Module {name} is factored, but the model still ties its weight. Untie it first: set "
                "config.tie_word_embeddings = False and take it out of all_tied_weights_keys."
            )
    specs = described(model)
    set_guard(model, None if specs else guard_of(ties))
    model.config.quantization_config = EckartConfig(specs, ties)


def described(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What the config says of a model's modules: experts that are taken apart, heads that are gone, and forms."""
    specs = {name: experts.spec() for name, experts in experts_apart(model).items()}
    specs |= {name: cut.spec() for name, cut in cut_heads(model).items()}
    return specs | {name: form.spec() for name, form in factored_modules(model).items()}


def is_special(model: PreTrainedModel) -> bool:
    """Whether a model holds what only a described checkpoint brings back."""
    return bool(described(model) or shared_parameters(model))


def unmark(model: PreTrainedModel) -> None:
    """Undo :func:`mark` on a model whose forms have been replaced by dense modules.

    Args:
        model: a model without forms and shared parameters.

    Raises:
        ModelError: some are left.
    """
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
    set_guard(model, None)
    if isinstance(getattr(model.config, "quantization_config", None), EckartConfig):
        del model.config.quantization_config


def register() -> None:
    """Tell transformers of the format; calling it again, or reloading the module, does no harm."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    auto.register_quantization_config(METHOD)(EckartConfig)
    auto.register_quantizer(METHOD)(EckartQuantizer)


def _locate(model: PreTrainedModel, name: str) -> str | None:
    """Where a module of the checkpoint is in this model class; None if it belongs to another head."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    for place in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(place)
        except AttributeError:
            continue
        return place
    first = name.removeprefix(prefix).partition(".")[0]
    own = type(model).__name__ in (model.config.architectures or ())
    if own or hasattr(model, first) or hasattr(model.base_model, first):
        raise CheckpointError(
            f"quantization_config.modules in config.json names {name}, which {type(model).__name__} does "
            "not have. Load the model with the class in config.architectures, or download config.json "
            "again."
        )
    return None


def _cut(model: PreTrainedModel, name: str, spec: dict[str, Any]) -> None:
    """Take heads out of an attention on the empty model."""
    place = _locate(model, name)
    if place is None:
        return
    try:
        HeadCut.of_spec(spec).apply(model.get_submodule(place))
    except UsageError as error:
        raise CheckpointError(
            f"Module {name} in quantization_config of config.json: {error} Load the model with the config and the "
            "transformers that it was saved with, or a newer eckart: pip install -U eckart"
        ) from error


def _located_ties(model: PreTrainedModel, ties: dict[str, str]) -> dict[str, str]:
    """Ties by the names that this model class has; those of another head are left out."""
    found: dict[str, str] = {}
    for pair in ties.items():
        places = []
        for name in pair:
            module, _, key = name.rpartition(".")
            place = _locate(model, module)
            if place is not None and model.get_submodule(place)._parameters.get(key) is None:
                raise CheckpointError(
                    f"quantization_config.ties in config.json names {name}, but {place} has no parameter {key!r}. "
                    "Download config.json again."
                )
            places.append(f"{place}.{key}" if place is not None else None)
        target, source = places
        if target is None and source is None:
            continue
        shapes = [tuple(model.get_parameter(place).shape) for place in places if place is not None]
        if target is None or source is None or shapes[0] != shapes[1]:
            raise CheckpointError(
                f"quantization_config.ties in config.json says that {pair[0]} is {pair[1]}, but their shapes are "
                f"{' and '.join(map(str, shapes))}. Load the model with the class in config.architectures, or download "
                "config.json again."
            )
        found[target] = source
    return found


def _same_place(model: PreTrainedModel, one: str, other: str) -> bool:
    prefix = f"{model.base_model_prefix}."
    return one.removeprefix(prefix) == other.removeprefix(prefix)


def _form(name: str, spec: dict[str, Any], dense: nn.Module) -> Factored:
    try:
        form = build(spec)
    except UsageError as error:
        raise CheckpointError(
            f"Module {name} in quantization_config of config.json cannot be built: {error} A newer eckart "
            "may know it: pip install -U eckart"
        ) from error
    weight = getattr(dense, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, nn.Parameter) else None
    if isinstance(form, FactoredLinear):
        rows, columns = form.out_features, form.in_features
    else:
        rows, columns = form.weight.shape  # type: ignore[misc]
    if shape is None or sorted(shape) != sorted((rows, columns)):
        raise CheckpointError(
            f"Module {name} in quantization_config of config.json is {rows} x "
            f"{columns}, but {type(dense).__name__} there has the shape {shape}. Load the model "
            "with the config it was saved with."
        )
    return form


def _without_guard(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in module.guards if isinstance(module, Experts) else ("weight",):
        state.pop(prefix + name, None)


register()
