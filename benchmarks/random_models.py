"""Models of known shapes with random weights, and their factored and sliced copies: time does not depend on numbers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.allocation.ranks import default_multiple
from eckart.data.inference import device_of
from eckart.forms import FORMS, FactoredLinear
from eckart.model import Site, find_sites, replace_module, share_parameters, shared_clone
from eckart.moments import shared_inputs
from eckart.speed.phases import random_inputs


def bert_base(layers: int = 12) -> PreTrainedModel:
    """The shape of BERT-base, 110 M."""
    return BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()


def smol_llama(layers: int = 30) -> PreTrainedModel:
    """The shape of SmolLM2-135M."""
    return llama(576, 1536, layers, heads=9, groups=3, vocabulary=49152)


def llama(
    width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, positions: int = 8192
) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=positions, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rank_for(form: str, heights: tuple[int, ...], width: int, keep: float) -> int:
    """The largest multiple that hardware likes whose multiply-adds are at most `keep` of those of the dense weights."""
    multiple = default_multiple((min(heights), width))
    budget = keep * sum(heights) * width
    if form == "pivoted":
        (height,) = heights
        limit = FORMS[form].max_rank(height, width)
        fits = [r for r in range(multiple, limit + 1, multiple) if r * (height + width - r) <= budget]
        return max(fits)
    return max(multiple, int(budget / (width + sum(heights))) // multiple * multiple)


@torch.no_grad()
def factored(model: PreTrainedModel, form: str, keep: float) -> PreTrainedModel:
    """A copy with every weight in a form, of random factors; "joint": weights that read one input share a factor."""
    smaller = shared_clone(model)
    sites = {site.name: site for site in find_sites(model).chosen}
    groups = [[name] for name in sites]
    if form == "joint":
        inputs = random_inputs(model, 1, 8)
        groups = list(shared_inputs(model, list(sites), lambda: model(**inputs)).values())
    ties: dict[str, str] = {}
    for group in groups:
        members = [sites[name] for name in group]
        kind = form if form != "joint" or len(group) > 1 else "lowrank"
        rank = rank_for(kind, tuple(site.out_features for site in members), members[0].in_features, keep)
        for site in members:
            replace_module(smaller, site.name, random_factors(kind, site, rank, model))
        if len(group) > 1:
            first, *others = sorted(group, key=list(sites).index)
            shared = FORMS[kind].shared_parameter
            ties |= {f"{other}.{shared}": f"{first}.{shared}" for other in others}
    share_parameters(smaller, ties)
    return smaller


def random_factors(form: str, site: Site, rank: int, model: nn.Module) -> FactoredLinear:
    dtype = next(p.dtype for p in model.parameters())
    module = FORMS[form].empty(
        *site.shape, rank, bias=site.has_bias, source=site.source, dtype=dtype, device=device_of(model)
    )
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(0, max(1, tensor.shape[-1]) ** -0.5)
        else:
            tensor.copy_(torch.randperm(tensor.numel(), device=tensor.device).view(tensor.shape))
    return module.eval()


@torch.no_grad()
def sliced(model: PreTrainedModel, keep: float) -> PreTrainedModel:
    """A copy of a Llama with that fraction of its neurons: smaller ordinary layers."""
    smaller = shared_clone(model)
    for site in find_sites(model).chosen:
        part = site.name.rpartition(".")[2]
        if part not in ("gate_proj", "up_proj", "down_proj"):
            continue
        old = model.get_submodule(site.name)
        assert isinstance(old, nn.Linear)
        assert not isinstance(old, Conv1D)
        inner = max(site.shape) if part != "down_proj" else site.in_features
        count = max(8, int(keep * inner) // default_multiple(site.shape) * default_multiple(site.shape))
        weight = old.weight[:, :count] if part == "down_proj" else old.weight[:count]
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        new.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        replace_module(smaller, site.name, new.eval())
    return smaller
