"""Models in which every layer is in another form: what no plan chooses, and every export must hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from eckart.checkpoint.description import attach_config
from eckart.forms import FORMS, LowRankSparse
from eckart.linalg import Problem, stack_problems
from eckart.model import (
    PrunedHeads,
    Site,
    SlicedFeatures,
    dense_weight,
    replace_module,
    share_parameters,
    store_factors,
)

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")


def put_form(model: nn.Module, names: Sequence[str], form: str, share: float = 0.5) -> None:
    """Factor weights in a form, nearest to what they are; those of a form that shares have a part in common."""
    sites = {name: _site(model, name) for name in names}
    kind = FORMS[form]
    problems = [Problem(dense_weight(model.get_submodule(name)).detach()) for name in names]
    block = kind.blocks(*sites[names[0]].shape)[0]
    rank = max(1, int(share * min(sites[names[0]].shape)))
    if kind.shared_parameter is None:
        rank = min(rank, kind.full_rank(*sites[names[0]].shape, block))
        solved = [kind.solve(problem, block, rank, "weight") for problem in problems]
    else:
        heights = [len(problem.target) for problem in problems]
        solved = kind.solve_group(stack_problems(problems), heights, rank, "weights")
    for name, found in zip(names, solved, strict=True):
        bias = model.get_submodule(name).bias
        module, note = store_factors(
            sites[name], form, rank, *found.truncated(rank), None if bias is None else bias.detach(), torch.float32,
            block,
        )  # fmt: skip
        assert note is None
        replace_module(model, name, module)
    if kind.shared_parameter is not None:
        first, *others = names
        share_parameters(model, {f"{other}.first.weight": f"{first}.first.weight" for other in others})


def _site(model: nn.Module, name: str) -> Site:
    module = model.get_submodule(name)
    source = "linear" if isinstance(module, nn.Linear) else "conv1d"
    return Site(name, source, *dense_weight(module).shape, module.bias is not None)


def put_lowrank_sparse(model: nn.Module, name: str, rank: int = 6, rows: int = 5) -> None:
    """Low-rank and a few rows that are not."""
    old: Any = model.get_submodule(name)
    left, right = FORMS["lowrank"].solve(Problem(old.weight.detach()), None, rank, name).truncated(rank)
    module = LowRankSparse(old.in_features, old.out_features, rank, rows, bias=old.bias is not None)
    stream = torch.Generator().manual_seed(0)
    places = torch.randperm(old.out_features, generator=stream)[:rows].sort().values
    module.store_sparse(left, right, torch.randn(rows, old.in_features, generator=stream) / 8, places, old.bias)
    replace_module(model, name, module)


def slice_neurons(model: nn.Module, layer: str, kept: int) -> None:
    """Leave a gated feed-forward layer its first neurons."""
    width = model.get_submodule(f"{layer}.mlp.down_proj").in_features
    for name, rows in (("gate_proj", (1,)), ("up_proj", (1,)), ("down_proj", ())):
        place = f"{layer}.mlp.{name}"
        model.set_submodule(place, SlicedFeatures(width, kept, rows).apply(model.get_submodule(place)))


def remove_head(model: LlamaForCausalLM, layer: str) -> None:
    """Take the first group of heads out of an attention."""
    config = model.config
    groups, width = config.num_key_value_heads, config.head_dim
    size = config.num_attention_heads // groups * width
    rows = {"q_proj": (size,), "k_proj": (width,), "v_proj": (width,)}
    attention = model.get_submodule(f"{layer}.self_attn")
    PrunedHeads(groups, tuple(range(1, groups)), rows, {"o_proj": size}, {}).apply(attention)


def mixed_llama(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Put every form but the last two functions' into a Llama of eight layers or more, and describe it."""

    def names(layer: int, parts: Sequence[str]) -> list[str]:
        return [f"model.layers.{layer}.{part}" for part in parts]

    others = ("self_attn.o_proj", "mlp.down_proj")
    for part in (*ATTENTION, *GATED, *others):
        put_form(model, names(0, [part]), "lowrank")
        put_form(model, names(3, [part]), "pivoted")
    for layer, form in ((1, "joint"), (2, "pivoted-joint")):
        put_form(model, names(layer, ATTENTION), form)
        put_form(model, names(layer, GATED), form)
    put_form(model, names(1, ["self_attn.o_proj"]), "kronecker")
    put_lowrank_sparse(model, "model.layers.1.mlp.down_proj")
    put_form(model, ["model.layers.4.mlp.up_proj", "model.layers.5.mlp.up_proj"], "shared-basis")
    slice_neurons(model, "model.layers.6", 40)
    attach_config(model)
    return model
