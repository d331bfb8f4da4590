"""The checkpoint format inside transformers: importing this module registers it.

``config.json`` says `quantization_config: {quant_method: "eckart: ...", format_version, modules, ties, quantization}`;
transformers asks the quantizer registered under that name to put the forms in place before it loads the weights.
The loaded model is left an ordinary one that can be cast, trained and saved. One with a `quantization` has integers in
some of its layers: it can be cast and saved.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart.adaptive import attach_spec
from eckart.checkpoint.compare_files import compare_with_files, require_filled
from eckart.checkpoint.description import METHOD, WRITTEN, EckartConfig, attach_config, detach_config, is_special
from eckart.checkpoint.guard import guard_of
from eckart.checkpoint.places import (
    built,
    locate,
    located_ties,
    quantized,
    same_place,
    take_heads_out,
    take_neurons_out,
)
from eckart.errors import CheckpointError
from eckart.forms.transformers_internals import (
    adjust_biases_again,
    expect_again,
    forget_quantization,
    ignore_unexpected,
    is_initialized,
    keep_biases_of,
    mark_initialized,
)
from eckart.model import (
    SeparateExperts,
    declared_ties,
    factored_modules,
    fused_experts,
    keep_slicing,
    parameter_owner,
    share_parameters,
    tie_factored,
)
from eckart.model.attention_heads import FORM as HEADS
from eckart.model.experts import FORM as EXPERTS
from eckart.model.slicing import FORM as SLICED
from eckart.quantization import quantized_layers, require_torchao
from eckart.storage.shards import read_header

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


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

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        assert isinstance(self.quantization_config, EckartConfig)
        factored = {}
        guarded: list[str] = []  # names of the empty tensors
        foreign = self._make_adaptive(model)
        specs = dict(self.quantization_config.modules)
        for name in [name for name, spec in specs.items() if isinstance(spec, dict) and spec.get("form") == EXPERTS]:
            del specs[name]
            guarded += self._take_apart(model, name)
        for name in [name for name, spec in specs.items() if isinstance(spec, dict) and spec.get("form") == HEADS]:
            take_heads_out(model, name, specs.pop(name))
        for name in [name for name, spec in specs.items() if isinstance(spec, dict) and spec.get("form") == SLICED]:
            take_neurons_out(model, name, specs.pop(name))
        for name, spec in specs.items():
            place = locate(model, name)
            if place is not None:
                factored[place] = built(name, spec, model.get_submodule(place))
        before = declared_ties(model)
        for place, form in factored.items():
            # Otherwise the loader would expect the guard, the empty tensor under the dense weight's name.
            self._handles.append(form.register_state_dict_post_hook(_without_guard))
            model.set_submodule(place, form)
        # Another class's head has a guard as well.
        guarded += [f"{name}.weight" for name in dict.fromkeys((*factored, *specs))]
        guarded += self._make_quantized(model)
        if factored:
            tie_factored(model, before, tie=False)
            tied = model.all_tied_weights_keys
            half = next((n for n in factored if f"{n}.weight" in tied or f"{n}.weight" in tied.values()), None)
            if half is not None:
                raise CheckpointError(
                    f"Module {half} is factored, but the config ties its weight (tie_word_embeddings). Set "
                    "tie_word_embeddings to false in config.json."
                )
        self._ties = located_ties(model, self.quantization_config.ties)
        described = self.quantization_config.modules or self.quantization_config.quantization
        if not described and (guard := guard_of(self.quantization_config.ties)) is not None:
            guarded.append(guard)
            self._expect_guard(model, guard)
        self._tie_on_loading(model)
        files = [Path(file) for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        stored = {name: entry for file in files for name, entry in read_header(file).items()}
        compare_with_files(model, stored, Path(str(model.config.name_or_path)), whole=False)
        if guarded or foreign:
            prefix = re.escape(model.base_model_prefix)
            names = [re.escape(name.removeprefix(f"{model.base_model_prefix}.")) for name in guarded]
            names += [rf"{re.escape(name)}\..*" for name in foreign]
            self._pattern = rf"^(?:{prefix}\.)?(?:{'|'.join(names)})$"
            ignore_unexpected(model, self._pattern)

    def _make_adaptive(self, model: PreTrainedModel) -> list[str]:
        """Let the model behave as it did; returns the names of what only another class of models needs for that."""
        assert isinstance(self.quantization_config, EckartConfig)
        stated = self.quantization_config.adaptive
        if stated is None:
            return []
        blocks = [place for name in stated["blocks"] if (place := locate(model, name)) is not None]
        return attach_spec(model, stated, blocks)

    def _take_apart(self, model: PreTrainedModel, name: str) -> list[str]:
        """Put single experts where the model's class has fused ones; returns the names of their guards."""
        place = locate(model, name)
        if place is None:
            return []
        if place not in dict(fused_experts(model)):
            raise CheckpointError(
                f"Module {name} in quantization_config of config.json are experts taken apart, but "
                f"{type(model.get_submodule(place)).__name__} there holds none that eckart can take apart. Load it "
                "with the transformers that it was saved with, or a newer eckart: pip install -U eckart"
            )
        experts = SeparateExperts(model.get_submodule(place))
        self._handles.append(experts.register_state_dict_post_hook(_without_guard))
        model.set_submodule(place, experts)
        return [f"{place}.{guard}" for guard in experts.guards]

    def _make_quantized(self, model: PreTrainedModel) -> list[str]:
        """Put layers that hold integers where the model has floating-point ones; returns the names of their guards."""
        assert isinstance(self.quantization_config, EckartConfig)
        stated = self.quantization_config.quantization
        if stated is None:
            return []
        require_torchao()
        for name, spec in stated["layers"].items():
            place = locate(model, name)
            if place is not None:
                old = model.get_submodule(place)
                layer = quantized(name, stated["kind"], spec, old)
                self._handles.append(layer.register_state_dict_post_hook(_without_guard))
                model.set_submodule(place, keep_slicing(old, layer))
        return [f"{name}.weight" for name in stated["layers"]]

    def _expect_guard(self, model: PreTrainedModel, guard: str) -> None:
        """Let the loader neither expect numbers under a guarded name nor tie it; that is done afterwards."""
        place = next((target for target in self._ties if same_place(model, target, guard)), None)
        if place is None:  # of another head
            return
        owner, key = parameter_owner(model, place)
        mark_initialized(owner.get_parameter(key))

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
        owners = {id(parameter_owner(model, target)[0]) for target in self._ties}
        keep_biases_of(model, owners)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self._ties:
            adjust_biases_again(model)
            model.all_tied_weights_keys = {
                target: source for target, source in model.all_tied_weights_keys.items() if target not in self._ties
            }
            share_parameters(model, self._ties)
        for handle in self._handles:
            handle.remove()
        expect_again(model, self._pattern)
        forms = factored_modules(model)
        for form in forms.values():
            form.refresh()
        layers = quantized_layers(model)
        for layer in layers.values():
            layer.computes = layer.computes.new_empty(0, device=layer.qdata.device)
        lost = [
            f"{name}.{key}"
            for name, form in {**forms, **layers}.items()
            for key, tensor in (*form.named_parameters(), *form.named_buffers())
            # transformers marks what it has filled; on the meta device it stands for a file on disk.
            if not is_initialized(tensor)
            and not tensor.is_meta
            and key not in form._non_persistent_buffers_set
            and tensor.numel()
        ]
        if lost:
            raise CheckpointError(
                f"{len(lost)} tensors of factored modules are missing from the weights of "
                f"{model.config.name_or_path}: {', '.join(dict.fromkeys(lost))}. Without them the model would be "
                "filled with random numbers. Download the folder again."
            )
        require_filled(model)
        damaged = {name: damage for name, form in forms.items() if (damage := form.find_damage()) is not None}
        if damaged:
            name, damage = next(iter(damaged.items()))
            raise CheckpointError(
                f"The weights of {model.config.name_or_path} are damaged: in module {name} {damage} ({len(damaged)} "
                "such modules). Download the folder again."
            )
        forget_quantization(model)
        if is_special(model):
            attach_config(model)
        else:  # adapters were merged into dense layers, and the description was left empty
            detach_config(model)
        return model


def register() -> None:
    """Tell transformers of the format; calling it again, or reloading the module, does no harm."""
    for name in (METHOD, WRITTEN):
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(name, None)
        auto.AUTO_QUANTIZER_MAPPING.pop(name, None)
        auto.register_quantization_config(name)(EckartConfig)
        auto.register_quantizer(name)(EckartQuantizer)


def _without_guard(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in module.guards if isinstance(module, SeparateExperts) else ("weight",):
        state.pop(prefix + name, None)


register()
