"""What the generated file has to put in place of the modules that a model's class builds, and the tensors for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.errors import ModelError
from eckart.exports.remote_code.roles import role_of
from eckart.forms import (
    Factored,
    FactoredEmbedding,
    FactoredLinear,
    Joint,
    Kronecker,
    LowRank,
    LowRankSparse,
    Pivoted,
    PivotedJoint,
    SafeEmbedding,
    SharedBasis,
    TiedHead,
)
from eckart.model import SeparateExperts, pruned_heads, separate_experts, shared_parameters

WAY_OUT = "Export the dense model instead: --format dense"


@dataclass(frozen=True)
class Replacement:
    """A module of the exported model that its class does not build.

    Attributes:
        form: name of its class in the generated file's `FORMS`.
        arguments: of that class, plain JSON values; `of` is the name of another module.
        tensors: its parameters and buffers by name.
    """

    form: str
    arguments: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def entry(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {"form": self.form, **self.arguments}


@dataclass(frozen=True)
class Described:
    """A model as the generated file makes it.

    Attributes:
        replacements: name of a module -> what stands there; experts come before what is in them.
        tensors: everything that the checkpoint holds, by its name in the exported model.
        head_counts: name of a module -> its attributes that count heads, where heads are gone.
        unties: whether the configuration may not tie input and output embeddings any more.
    """

    replacements: dict[str, Replacement]
    tensors: dict[str, Tensor]
    head_counts: dict[str, dict[str, int]]
    unties: bool


def describe(model: PreTrainedModel) -> Described:
    """Compare a model with what its class builds.

    Raises:
        ModelError: something is in it that no generated file can put in place.
    """
    empty = built_by_class(model)
    replacements = {name: _experts(experts) for name, experts in separate_experts(model).items()}
    for name in replacements:
        empty.set_submodule(name, SeparateExperts(empty.get_submodule(name)))
    replacements |= _factored(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not _is_inside(name, model):
            there = _find(empty, name)
            if there is None or there.weight.shape != module.weight.shape:
                replacements[name] = _resized(module)
    replacements |= _dense_ties(model, replacements)
    replacements |= _whole(model, replacements)
    tensors = _tensors(model, replacements)
    ordered = dict(
        sorted(replacements.items(), key=lambda item: (item[1].form != "experts", "of" in item[1].arguments))
    )
    unties = any(one.form == "tied-head" for one in replacements.values())
    return Described(ordered, tensors, _head_counts(model), unties)


def built_by_class(model: PreTrainedModel) -> Any:
    """What the model's class builds from its configuration, without memory."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        return type(model)(config)


def _factored(model: PreTrainedModel) -> dict[str, Replacement]:
    first: dict[int, str] = {}  # parameter that several have -> the first module that holds it
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        held = _shared(module)
        if held is not None:
            first.setdefault(id(held), name)
            groups.setdefault(id(held), []).append(name)
    found: dict[str, Replacement] = {}
    for name, module in model.named_modules():
        if isinstance(module, Factored):
            held = _shared(module)
            group = [name] if held is None else groups[id(held)]
            found[name] = _replacement(name, module, group, model)
    return found


def _shared(module: nn.Module) -> Tensor | None:
    """The parameter by which several modules of a stored form belong together."""
    if isinstance(module, FactoredLinear):
        return module.held_parameter()
    return module.codes.weight if isinstance(module, FactoredEmbedding | TiedHead) else None


def _replacement(name: str, module: Factored, group: list[str], model: PreTrainedModel) -> Replacement:
    of = {} if group[0] == name else {"of": group[0]}
    if isinstance(module, FactoredLinear):
        sizes = {"in_features": module.in_features, "out_features": module.out_features}
        if module.rank == (module.out_features if isinstance(module, Pivoted) else module.in_features) and isinstance(
            module, Pivoted | PivotedJoint
        ):
            return _multiplied_out(module)  # no rows or columns are left to be combined
        sizes |= {"rank": module.rank, "bias": module.has_bias}
        return _linear(module, sizes, group.index(name), len(group), of)
    if isinstance(module, TiedHead):
        if not of or not isinstance(model.get_submodule(group[0]), FactoredEmbedding):
            raise ModelError(
                f"{name}: a tied head comes before its embedding, which no generated file makes. {WAY_OUT}"
            )
        # A copy: of two names for one tensor the file would have the first.
        bias = {} if module.bias is None else {"bias": module.bias.detach().clone()}
        return Replacement(
            "tied-head", {"out_features": module.out_features, "bias": module.bias is not None} | of, bias
        )
    if isinstance(module, FactoredEmbedding):
        return _embedding(name, module, model, of)
    raise ModelError(f"{name}: the form {module.form} cannot be exported as remote code. {WAY_OUT}")


def _linear(module: FactoredLinear, sizes: dict[str, Any], place: int, count: int, of: dict[str, str]) -> Replacement:
    state = _state(module)
    if isinstance(module, PivotedJoint | Joint) and (count > 1 or isinstance(module, PivotedJoint)):
        kind = "pivoted-joint" if isinstance(module, PivotedJoint) else "joint"
        names = {"output_factor": "second"} | ({} if of else {"input_factor": "first"})
        tensors = _renamed(state, names)
        if kind == "pivoted-joint" and not of:
            tensors["order"] = state["order"].long()
        return Replacement(kind, sizes | {"place": place, "readers": count} | of, tensors)
    if isinstance(module, SharedBasis) and count > 1:
        names = {"output_factor": "second"} | ({} if of else {"input_factor": "first"})
        return Replacement("shared-basis", sizes | of, _renamed(state, names))
    if isinstance(module, LowRank):
        return Replacement("lowrank", sizes, _renamed(state, {"input_factor": "first", "output_factor": "second"}))
    if isinstance(module, Pivoted):
        tensors = _renamed(state, {"pivots": "first", "others": "second"})
        return Replacement("pivoted", sizes, tensors | {"index": torch.argsort(module.order)})
    if type(module) is LowRankSparse:
        names = {"input_factor": "first", "output_factor": "second", "sparse": "sparse"}
        return Replacement(
            "lowrank-sparse", sizes | {"rows": module.rows}, _renamed(state, names) | {"places": state["places"].long()}
        )
    if isinstance(module, Kronecker):
        blocks = {"block_in": module.block_in, "block_out": module.block_out, "outer_first": module.outer_first}
        return Replacement("kronecker", sizes | blocks, state)
    raise ModelError(f"the form {module.form} cannot be exported as remote code. {WAY_OUT}")


def _embedding(name: str, module: FactoredEmbedding, model: PreTrainedModel, of: dict[str, str]) -> Replacement:
    if of:
        first: Any = model.get_submodule(of["of"])
        if {**first.spec(), "padding_idx": None} != {**module.spec(), "padding_idx": None}:
            raise ModelError(f"{name} has the numbers of {of['of']}, but another scale or form. {WAY_OUT}")
        return Replacement("same", of, {})
    arguments = {
        "num_embeddings": module.num_embeddings, "embedding_dim": module.embedding_dim, "rank": module.rank,
        "blocks": module.blocks, "padding_idx": module.padding_idx, "scale": module.scale,
    }  # fmt: skip
    if isinstance(module, SafeEmbedding):
        attention = {"causal": module.causal, "heads": module.heads}
        return Replacement("safe-embedding", arguments | attention, _state(module))
    if set(_state(module)) != {"codes.weight", "expand.weight"}:
        raise ModelError(f"{name}: the form {module.form} cannot be exported as remote code. {WAY_OUT}")
    return Replacement("embedding", arguments, _state(module))


def _multiplied_out(module: FactoredLinear) -> Replacement:
    sizes = {"in_features": module.in_features, "out_features": module.out_features, "bias": module.has_bias}
    bias = module.dense_bias()
    tensors = {"weight": module.to_dense().detach()} | ({} if bias is None else {"bias": bias.detach()})
    return Replacement("linear", sizes, tensors)


def _resized(module: Any) -> Replacement:
    rows, columns = module.weight.shape
    if isinstance(module, Conv1D):
        return Replacement("conv1d", {"in_features": rows, "out_features": columns}, _state(module))
    sizes = {"in_features": columns, "out_features": rows, "bias": module.bias is not None}
    return Replacement("linear", sizes, _state(module))


def _experts(experts: SeparateExperts) -> Replacement:
    names = [name for name in experts.guards if not name.endswith("_bias")]
    return Replacement("experts", {"names": names}, {})


def _dense_ties(model: PreTrainedModel, replaced: Mapping[str, Replacement]) -> dict[str, Replacement]:
    """Modules all of whose parameters are those of another one."""
    found: dict[str, dict[str, str]] = {}
    for target, source in shared_parameters(model).items():
        name, _, key = target.rpartition(".")
        if not any(_within(name, place) for place, one in replaced.items() if one.form not in ("linear", "conv1d")):
            found.setdefault(name, {})[key] = source
    ties: dict[str, Replacement] = {}
    for name, keys in found.items():
        sources = {source.rpartition(".")[0] for source in keys.values()}
        own = dict(model.get_submodule(name).named_parameters())
        other = next(iter(sources))
        if len(sources) > 1 or set(keys) != set(own) or any(keys[key] != f"{other}.{key}" for key in keys):
            raise ModelError(f"{name} shares only some of its parameters with {other}. {WAY_OUT}")
        ties[name] = Replacement("same", {"of": other}, {})
    return ties


def _whole(model: PreTrainedModel, replaced: Mapping[str, Replacement]) -> dict[str, Replacement]:
    """Linears that are as they were, or smaller, where others of their role are factored."""
    factored = {role_of(name) for name, one in replaced.items() if one.form not in ("linear", "conv1d", "experts")}
    found = {}
    for name, module in model.named_modules():
        known = replaced.get(name)
        if role_of(name) in factored and type(module) is nn.Linear and (known is None or known.form == "linear"):
            plain = _resized(module)
            found[name] = Replacement("whole", plain.arguments, {f"whole.{key}": t for key, t in plain.tensors.items()})
    return found


def _head_counts(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, pruned in pruned_heads(model).items():
        for path, number in pruned.numbers.items():
            where, _, attribute = path.rpartition(".")
            found.setdefault(f"{name}.{where}".rstrip("."), {})[attribute] = number
    return found


def _tensors(model: PreTrainedModel, replaced: Mapping[str, Replacement]) -> dict[str, Tensor]:
    """By name in the exported model; what a module of the model's class ties is there under each of its names."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(_within(name, place) for place, one in replaced.items() if one.form != "experts")
        if not inside:
            stem = f"{name}." if name else ""
            own = {**module._parameters, **module._buffers}
            hidden = module._non_persistent_buffers_set
            found |= {stem + key: tensor for key, tensor in own.items() if tensor is not None and key not in hidden}
    for name, one in replaced.items():
        found |= {f"{name}.{key}": tensor for key, tensor in one.tensors.items()}
    return found


def _state(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and stored buffers, without the empty tensor that a checkpoint of eckart has."""
    state: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    hidden = module._non_persistent_buffers_set
    return state | {name: tensor for name, tensor in module.named_buffers() if name not in hidden}


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of the children `names` (new name -> name in the state)."""
    return {
        f"{new}.{key.removeprefix(f'{old}.')}": tensor
        for new, old in names.items()
        for key, tensor in state.items()
        if key.startswith(f"{old}.")
    }


def _is_inside(name: str, model: nn.Module) -> bool:
    """Whether a module is part of one in a stored form."""
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:end])), Factored) for end in range(1, len(parts)))


def _within(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def _find(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
