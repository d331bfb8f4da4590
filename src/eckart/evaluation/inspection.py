"""Which weights of a model can be factored, their spectra, and where its parameters are."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.checkpoint.open import find_checkpoint, open_model
from eckart.config import merge_recipe, resolve_device
from eckart.data import model_kind
from eckart.data.inference import dummy_inputs, evaluating, forward, progress
from eckart.evaluation.recipe import InspectionRecipe
from eckart.evaluation.sizes import count_sizes
from eckart.forms import FORMS
from eckart.linalg import require_finite
from eckart.model import Site, dense_weight, find_sites, preserve_random_state, with_separate_experts
from eckart.moments import shared_inputs

logger = logging.getLogger(__name__)

ENERGY = 0.9
"""The part of the sum of a weight's squared singular values whose rank is shown."""


def inspect(
    model: PreTrainedModel | str | Path, *, recipe: InspectionRecipe | None = None, **options: Any
) -> dict[str, Any]:
    """Find the weights of a model that can be factored (the sites), their spectra, and where the parameters are.

    A model in memory is not changed.

    Args:
        model: in memory, a folder or a hub name; not factored.
        recipe: all options in one object; keyword options override it.
        **options: fields of :class:`eckart.InspectionRecipe`, such as `ignore="*.attention.*"`.

    Returns:
        `kinds`: per kind of site its `count`, `shape`, `elements`, mean `effective_rank` (exp of the entropy of the
        squared singular values), `rank_of_energy` (rank that holds nine tenths of their sum) and `break_even`
        (largest rank that stores fewer numbers than the dense weight, by form); `groups`: kinds that share an input;
        `parameters`: where they are; `skipped`: reason -> modules. All plain JSON values.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        UsageError: for an unknown option, with the nearest spelling, or a pattern that matches nothing.
        ModelError: if there is nothing to factor, or the model is factored already.
    """
    recipe = merge_recipe(InspectionRecipe, recipe, options, "eckart.inspect")
    dtype = None
    if not isinstance(model, PreTrainedModel):
        trusted = recipe.trust_remote_code
        opened = open_model(find_checkpoint(model, recipe.revision, trust_remote_code=trusted, purpose="inspect"))
        model, dtype = opened.model, opened.dtype
    with preserve_random_state():
        model = with_separate_experts(model)
        sites = find_sites(model, recipe.targets, recipe.ignore)
        return {
            "model": type(model).__name__,
            "kinds": _kinds(model, sites.chosen, resolve_device(recipe.device)),
            "groups": _groups(model, [site.name for site in sites.chosen]),
            "parameters": _parameters(model, sites.chosen),
            "sizes": count_sizes(model, dtype=dtype).model.as_dict(),
            "skipped": _skipped(sites.skipped),
        }


def _kinds(model: PreTrainedModel, sites: Sequence[Site], device: torch.device) -> list[dict[str, Any]]:
    """The sites by kind and shape, with the means of their ranks."""
    kinds: dict[str, dict[str, Any]] = {}
    for site in progress(sites, what="spectra", total=len(sites)):
        weight = dense_weight(model.get_submodule(site.name)).detach().to(device).float()
        require_finite(weight, f"{site.name}.weight")
        squared = torch.linalg.svdvals(weight).cpu().double().square()
        row = kinds.setdefault(f"{site.kind} {site.shape}", _row(site))
        row["count"] += 1
        row["elements"] += site.elements
        row["effective"].append(_effective_rank(squared))
        row["energy"].append(_rank_of_energy(squared))
    for row in kinds.values():
        row["effective_rank"] = sum(ranks := row.pop("effective")) / len(ranks)
        row["rank_of_energy"] = sum(ranks := row.pop("energy")) / len(ranks)
    return list(kinds.values())


def _row(site: Site) -> dict[str, Any]:
    # The terms of a form in blocks are no ranks of the weight; alone, what shares a basis is low-rank.
    ranked = {
        n: form for n, form in FORMS.items() if form.blocks(*site.shape) == (None,) and form.shared_parameter is None
    }
    even = {name: form.max_rank(*site.shape) for name, form in ranked.items()}
    start: dict[str, Any] = {"count": 0, "elements": 0, "effective": [], "energy": []}
    return {"kind": site.kind, "shape": list(site.shape), "break_even": even, **start}


def _effective_rank(squared: Tensor) -> float:
    share = squared / squared.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


def _rank_of_energy(squared: Tensor) -> int:
    return int((squared.cumsum(0) < ENERGY * squared.sum()).sum()) + 1


def _groups(model: PreTrainedModel, names: Sequence[str]) -> list[dict[str, Any]]:
    """Kinds of sites that are called on one tensor, found by one small forward pass; empty if none runs."""
    try:
        inputs = _probe(model)
        with evaluating(model):
            groups = shared_inputs(model, names, lambda: forward(model, inputs))
    except Exception as error:  # whatever a model's own code raises
        logger.warning("no forward pass on a probe (%s: %s): shared inputs are not shown", type(error).__name__, error)
        return []
    counts: dict[tuple[str, ...], int] = {}
    for members in groups.values():
        kinds = tuple(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in members))
        if len(members) > 1:
            counts[kinds] = counts.get(kinds, 0) + 1
    return [{"kinds": list(kinds), "count": count} for kinds, count in counts.items()]


def _probe(model: PreTrainedModel) -> dict[str, Tensor]:
    text = model.config.get_text_config()
    if model.main_input_name != "input_ids":
        return dummy_inputs(model)
    ids = torch.arange(1, 9)[None] % max(2, int(getattr(text, "vocab_size", 8)))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model_kind(model.config, model) == "encoder-decoder":
        inputs |= {"decoder_input_ids": ids}
    return inputs


def _parameters(model: PreTrainedModel, chosen: Sequence[Site]) -> dict[str, int]:
    """Parameters by where they are, each counted once: what is tied belongs to the first that names it."""
    site_names = {site.name for site in chosen}
    head = model.get_output_embeddings()
    seen: set[int] = set()
    found = {"sites": 0, "embeddings": 0, "output head": 0, "biases and norms": 0, "other matrices": 0}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.dim() < 2:
                place = "biases and norms"
            elif name in site_names:
                place = "sites"
            elif isinstance(module, nn.Embedding):
                place = "embeddings"
            else:
                place = "output head" if module is head else "other matrices"
            found[place] += parameter.numel()
    return found


def _skipped(skipped: Mapping[str, str]) -> list[dict[str, Any]]:
    """Skipped modules by kind and reason."""
    rows: dict[tuple[str, str], int] = {}
    for name, reason in skipped.items():
        key = (re.sub(r"\.\d+(?=\.|$)", ".*", name), reason)
        rows[key] = rows.get(key, 0) + 1
    return [{"kind": kind, "reason": reason, "count": count} for (kind, reason), count in rows.items()]
