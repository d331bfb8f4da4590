"""LoRA of peft by the names of the layers: an adapter beside a whole factored layer.

peft knows `nn.Linear` and `Conv1D`. Of a factored layer it sees the leaves alone, whose names no adapter of the dense
model has; what it is told here is how to put its own adapter beside the layer, `y = W' x + (alpha / r) B A x`. So
`target_modules=["q_proj", "v_proj"]` and peft's defaults mean what they mean for the dense model, and the adapter's
file fits both.

peft asks a chain of functions which of its classes fits a module. The last of them is replaced by one that knows
factored layers too; peft's own hook (`LoraConfig._register_custom_module`) would have to be called for every config.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as layers
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from eckart.errors import UsageError
from eckart.forms import FactoredLinear, LowRank, LowRankSparse, TiedHead
from eckart.model.replace import dense_module, factored_modules

PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the weight of the layer as it is."""

SHARED_WITH = "shared_with"
"""On a part of a factored layer: what else has its weight."""

LAYERS, HEAD = "other layers", "the output head"

GROWS = (
    "adapters beside factored layers are merged exactly, so that the layers grow: their ranks by the adapters' ranks, "
    "or to dense matrices where those are smaller. Adapters on the factors (target_modules='all-linear') keep the size"
)


class FactoredLora(layers.Linear):
    """The adapter of peft beside a factored layer.

    Merged, the layer is another one: `B' = [B, s B_l]`, `A' = [A; A_l]`, of rank k + r; a dense one where that stores
    more numbers, or where the form is no product of two factors. The unmerged layer is kept, and comes back.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        _refuse_variants(options.get("config") or options.get("lora_config"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(base_layer, adapter_name, **options)

    def update_layer(self, *args: Any, **options: Any) -> None:
        """As of peft; a second adapter comes here as well."""
        _refuse_variants(options.get("config") or options.get("lora_config"))
        super().update_layer(*args, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the layer that computes what layer and adapters compute in the layer's place.

        Raises:
            UsageError: the layer's numbers are the embedding's too.
            ValueError: with `safe_merge`, an adapter holds a number that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return
        base: Any = self.base_layer
        if isinstance(base, TiedHead):
            raise UsageError(
                "merging LoRA: the output head is tied to factored embeddings, whose numbers an adapter cannot change "
                "alone. Leave it out of target_modules, or make the model dense first: eckart.densify(model)"
            )
        if not next(base.parameters()).is_floating_point():
            raise UsageError(
                "merging LoRA: the layer is quantized, and rounding again what is merged would change the model. Put "
                "the adapter on the model in floating-point numbers, merge it there, and quantize the result."
            )
        pairs: list[tuple[Any, Any, float]] = [(self.lora_B[n], self.lora_A[n], self.scaling[n]) for n in names]
        left = torch.cat([output.weight.detach().double() * scale for output, _, scale in pairs], dim=1)
        right = torch.cat([inner.weight.detach().double() for _, inner, _ in pairs])
        bias = base.bias
        for output, _, scale in pairs:
            if output.bias is not None:
                if bias is None:
                    raise UsageError("merging LoRA with lora_bias=True: the layer has no bias to merge it into.")
                bias = bias + output.bias * scale
        if safe_merge and not all(bool(torch.isfinite(part).all()) for part in (left, right)):
            raise ValueError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        warnings.warn(GROWS, stacklevel=2)
        merged = add_product(base, left, right, bias)
        vars(self).setdefault("unmerged_layer", base)  # no submodule: it is neither saved nor trained
        self.base_layer = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the layer back that was there before any merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        leaf = next(self.base_layer.parameters())
        before: nn.Module = vars(self).pop("unmerged_layer")
        self.base_layer = before.to(leaf.device, leaf.dtype)
        del self.merged_adapters[:]


class SharedLora(layers.Linear):
    """The adapter of peft on a factor that several layers share: before it is merged, the factor gets its own copy."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As of peft, on a copy."""
        leaf: Any = self.get_base_layer()
        if vars(leaf)[SHARED_WITH] == HEAD:
            raise UsageError(
                "merging LoRA: the factored embeddings are tied to the output head, which the adapter does not reach. "
                "Leave them out: LoraConfig(..., exclude_modules=['expand'])"
            )
        if not self.merged:
            vars(self)["shared"] = leaf.weight
            leaf.weight = nn.Parameter(leaf.weight.detach().clone(), requires_grad=leaf.weight.requires_grad)
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Share again."""
        if self.merged:
            leaf: Any = self.get_base_layer()
            leaf.weight = vars(self).pop("shared")
            del self.merged_adapters[:]


def add_product(base: FactoredLinear, left: Tensor, right: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer of weight `W' + left @ right`, in whichever of low-rank and dense stores fewer numbers.

    Args:
        base: W', (out, in).
        left: (out, r), float64.
        right: (r, in), float64.
        bias: (out,) or None.

    Returns:
        A module of the dtype, in the place and the mode of `base`.
    """
    leaf = next(base.parameters())
    factors = base.two_factors()
    module: nn.Module | None = None
    if factors is not None:
        left_too = torch.cat([factors[0], left.to(leaf.device)], dim=1)
        right_too = torch.cat([factors[1], right.to(leaf.device)])
        module = _factored(base, left_too, right_too, bias)
    if module is None:
        dense: Any = dense_module(base)
        with torch.no_grad():
            added = left.to(leaf.device) @ right.to(leaf.device)
            dense.weight.copy_(dense.weight.double() + (added.mT if base.source == "conv1d" else added))
            if bias is not None:
                dense.bias.copy_(bias)
        module = dense
    for parameter in module.parameters():
        parameter.requires_grad_(leaf.requires_grad)
    return module.train(base.training)


def _factored(base: FactoredLinear, left: Tensor, right: Tensor, bias: Tensor | None) -> FactoredLinear | None:
    """The layer of weight `left @ right` and the sparse rows of `base`; None where a dense one stores fewer numbers."""
    out_features, in_features, rank = base.out_features, base.in_features, left.shape[1]
    rows: int = base.rows if isinstance(base, LowRankSparse) else 0
    stored = LowRankSparse.size(out_features, in_features, rank, rows=rows).parameters
    if stored >= out_features * in_features or rank > min(out_features, in_features):
        return None
    options: dict[str, Any] = {"bias": bias is not None, "source": base.source}
    with torch.device("meta"):
        empty: FactoredLinear = (
            LowRankSparse(in_features, out_features, rank, rows, **options)
            if rows
            else LowRank(in_features, out_features, rank, **options)
        )
    leaf = next(base.parameters())
    module = empty.to(leaf.dtype).to_empty(device=leaf.device)
    if isinstance(base, LowRankSparse) and isinstance(module, LowRankSparse):
        module.store_sparse(left, right, base.sparse.weight, base.places, bias)
    else:
        module.store(left, right, bias)
    return module


def register() -> None:
    """Teach peft factored layers; calling it again does no harm."""
    for module, name, kind in (
        (lora_model, "dispatch_default", _Dispatch),
        (tuners_utils, "_maybe_include_all_linear_layers", _AllLinear),
    ):
        found = vars(module).get(name)
        if found is None:
            raise ImportError(f"{module.__name__} has no {name}")
        if not isinstance(found, kind):
            vars(module)[name] = kind(found)


class _Dispatch:
    """peft's choice of a class for a module that is none of a quantizer's."""

    def __init__(self, others: Any) -> None:
        self.others = others

    def __call__(self, target: nn.Module, adapter_name: str, **options: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, FactoredLinear | TiedHead) and options.get("parameter_name") is None:
            return FactoredLora(target, adapter_name, **options)
        if type(base) is nn.Linear and vars(base).get(SHARED_WITH):
            return SharedLora(target, adapter_name, **options)
        return self.others(target, adapter_name, **options)


class _AllLinear:
    """peft's meaning of "all-linear": of factored models the factors, but none that is shared, and no embedding."""

    def __init__(self, others: Any) -> None:
        self.others = others

    def __call__(self, config: Any, model: nn.Module) -> Any:
        forms = factored_modules(model)
        embeddings = tuple(f"{name}." for name, form in forms.items() if not isinstance(form, FactoredLinear))
        shared = shared_leaves(model)
        for name in shared:
            vars(model.get_submodule(name))[SHARED_WITH] = HEAD if name.startswith(embeddings) else LAYERS
        asked = getattr(config, "target_modules", None)
        config = self.others(config, model)
        if isinstance(asked, str) and not isinstance(config.target_modules, str):
            config.target_modules = {
                name for name in config.target_modules if name not in shared and not name.startswith(embeddings)
            }
        return config


def shared_leaves(model: nn.Module) -> set[str]:
    """Names of the parts of factored layers whose weight is another module's too."""
    holders: dict[int, set[str]] = {}
    for name, form in factored_modules(model).items():
        for key, parameter in form.named_parameters(prefix=name):
            holders.setdefault(id(parameter), set()).add(key.rpartition(".")[0])
    return {name for names in holders.values() if len(names) > 1 for name in names}


def _refuse_variants(config: Any) -> None:
    """Refuse what reads the numbers of the dense weight, or changes them, which a factored layer has not.

    Raises:
        UsageError: naming the options.
    """
    wanted = [
        field.name
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    ]
    if getattr(config, "use_dora", False) and "use_dora" not in wanted:
        wanted.append("use_dora")
    if config.init_lora_weights not in PLAIN_STARTS:
        wanted.append(f"init_lora_weights={config.init_lora_weights!r}")
    if wanted:
        raise UsageError(
            f"LoRA beside a factored layer: {', '.join(wanted)} needs the dense weight. Leave it out, adapt the "
            "factors (target_modules='all-linear'), or make the model dense first: eckart.densify(model)"
        )
