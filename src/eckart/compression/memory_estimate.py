"""What a compression takes in memory and on the disk, as a whole and block by block, before it starts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from eckart.allocation import Bases, RankMultiples
from eckart.calibration.grow_batches import CPU_TOKENS
from eckart.calibration.layerwise import all_blocks, blocks_of, split_by_block
from eckart.checkpoint.load import blank
from eckart.compression.basis_groups import adjacent
from eckart.compression.budget import Budget
from eckart.compression.joint_groups import possible_groups
from eckart.compression.neuron_layers import possible_layers
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.compression.size_limits import Limits, largest_choices, largest_joint_rank
from eckart.config import DEFAULT_BATCH_SIZE, DEFAULT_TOKENS, REFINED, default_samples
from eckart.data import model_kind
from eckart.distributed import Processes
from eckart.distributed.memory import PeakMemory, free_memory, rss
from eckart.errors import UsageError
from eckart.evaluation.divergence import PIECE
from eckart.forms import form_named
from eckart.model import Sites, find_sites, saved_embedding_parameters, with_separate_experts
from eckart.moments import needs_backward, statistics_named
from eckart.moments.memory import RECTANGLE, slicing_bytes, solving_bytes, statistics_bytes

logger = logging.getLogger(__name__)

CACHE_MEMORY = 0.5
"""GB of hidden states that stay in memory, unless told otherwise."""

USABLE = 0.8
"""The part of free memory that a run may plan with."""

FLOAT32 = 4

FILLED = 0.9
"""The part of a budget that a plan spends at least: ranks are whole numbers."""

TRAINED = 5
"""Numbers for each one of a block in training: itself, its gradient, two moments, and the best so far."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run takes, as a whole and block by block, in bytes.

    Attributes:
        whole: of memory, everything at once.
        streamed: of memory, block by block.
        disk: for the journal, the hidden states and the result, block by block.
        modules: the part of it that every process has.
        blocks: how many there are.
        at_once: how many blocks' statistics fit, where a model must be run as a whole.
        result: what will be published, at least.
    """

    whole: PeakMemory
    streamed: PeakMemory
    disk: int
    modules: int
    blocks: int
    at_once: int
    result: int = 0


def estimate_result(model: PreTrainedModel, recipe: Recipe) -> int:
    """Bytes of the weights that will be published, at least: what is no site stays as it is.

    Args:
        model: with single experts; may be on the meta device.
        recipe: what is asked for.
    """
    elements = sum(p.numel() for p in model.parameters())
    if recipe.plan is not None or recipe.speedup is not None or recipe.max_loss is not None:
        return 0  # the size is not known before
    sites = find_sites(model, recipe.targets, recipe.ignore)
    kept = Budget.of_recipe(model, sites, recipe).elements
    saved = saved_embedding_parameters(model, recipe.embeddings, recipe.embeddings_keep, recipe.ignore)
    return _stored(recipe, max(0, elements - saved - sum(site.elements for site in sites.chosen)) + int(kept * FILLED))


def estimate_memory(
    model: PreTrainedModel, recipe: Recipe, settings: Settings, available: int | None
) -> MemoryEstimate:
    """Estimate before anything is read.

    Args:
        model: may be on the meta device.
        recipe: what is asked for.
        settings: the method.
        available: bytes of free memory; None where the system does not say.
    """
    model = with_separate_experts(model)
    sites = find_sites(model, recipe.targets, recipe.ignore)
    shapes = {site.name: site.shape for site in sites.chosen}
    needs = settings.needs(planned=recipe.plan is not None)
    blocks = blocks_of(list(shapes), model)
    elements = sum(p.numel() for p in model.parameters())
    per_block = {block: sum(p.numel() for p in model.get_submodule(block).parameters()) for block in blocks}
    # Which sites share an input shows when the model runs; until then each counts its own.
    groups = split_by_block({name: (name,) for name in shapes}, model)
    statistics = {
        block: statistics_bytes([shapes[n] for n in own], [[i] for i in range(len(own))], needs)
        for block, own in groups.items()
    }
    by_layers = form_named(settings.form).shared_parameter is not None and not settings.joins
    bases = adjacent(sites.chosen, model, recipe.layers_per_basis) if by_layers else ()
    joint = possible_groups(sites.chosen, model) if settings.joins else ()
    together = [(sum(shapes[name][0] for name in group), shapes[group[0]][1]) for group in bases]
    solving = max(solving_bytes(*shape, needs) for shape in (*shapes.values(), *together))
    limits = _limits(model, sites, recipe, settings, bases)
    factors = {name: sum(c.factor_elements(*shapes[name]) for c in limits[name]) * FLOAT32 for name in shapes}
    for group in joint:  # each site has its own outputs' metric: only weights and factors are stacked
        rows, columns = sum(shapes[name][0] for name in group), shapes[group[0]][1]
        solving = max(solving, max(solving_bytes(*shapes[n], needs) for n in group) + RECTANGLE * rows * columns)
        largest = largest_joint_rank([shapes[name] for name in group], settings.joint_form, planned=False)
        factors[group[0]] += largest * (rows + columns) * FLOAT32
    for reader, *writers in possible_layers(sites.chosen, model) if settings.slices else ():
        takes, kept = slicing_bytes(*shapes[reader])
        solving = max(solving, takes)
        if settings.rest:  # their weights are never factored
            factors |= dict.fromkeys((reader, *writers), 0)
        factors[reader] += kept
    in_block = max((sum(factors[n] for n in own) for own in groups.values()), default=0)
    budget = Budget.of_recipe(model, sites, recipe)
    stored = _stored(recipe, elements - sum(site.elements for site in sites.chosen) + budget.elements)
    result = estimate_result(model, recipe)
    text = _text(model, recipe)
    cache = int((recipe.cache_memory if recipe.cache_memory is not None else CACHE_MEMORY) * 1e9)
    width = max(columns for _, columns in shapes.values())
    running = text.batch * width * FLOAT32 * (8 if needs_backward(needs) else 4)
    logits = _logits(model, text)
    largest = max(per_block.values(), default=elements)
    trained = TRAINED * largest * FLOAT32 if settings.refines else 0
    whole = PeakMemory(
        block=elements * FLOAT32 + stored + trained,
        statistics=sum(statistics.values()),
        solving=solving + sum(factors.values()),
        text=running * (max(len(blocks), 1) if needs_backward(needs) else 1) + logits,
        program=rss(),
        free=available,
    )
    inside = {id(part) for block in all_blocks(model) for part in model.get_submodule(block).modules()}
    own = (sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules() if id(m) not in inside)
    outside = max(own, default=0)  # one large module at a time: an embedding, a head
    streamed = PeakMemory(
        block=largest * FLOAT32 + trained,
        statistics=max(statistics.values(), default=0),
        solving=solving + in_block,
        text=min(cache, _waiting(model, sites, needs, text)) + running + logits,
        outside=outside * FLOAT32,
        program=rss(),
        free=available,
    )
    spare = (available or 0) * USABLE - whole.block - solving - running - logits
    at_once = int(spare // max(1, *statistics.values())) if needs else len(blocks)
    disk = _disk(model, sites, settings, recipe, factors, stored, text)
    # Inputs' statistics wait for the last layer of their group.
    disk += sum(statistics_bytes([shapes[n] for n in g[:-1]], [[i] for i in range(len(g) - 1)], needs) for g in bases)
    return MemoryEstimate(
        whole, streamed, disk, stored * (1 + settings.refit + settings.refines), len(blocks), max(1, at_once), result
    )


def try_estimate(
    folder: Path, recipe: Recipe, settings: Settings, processes: Processes
) -> tuple[MemoryEstimate | None, str]:
    """Estimate the memory of a run on a checkpoint without loading its weights.

    Returns:
        The estimate and "", or None and why there is none: then nobody knows whether the model fits into memory.
    """
    try:
        model = blank(folder, trust_remote_code=recipe.trust_remote_code)
        # Processes of one machine share its memory; GPUs each have their own.
        shared = 1 if processes.device.type == "cuda" else processes.size
        available = free_memory(processes.device)
        return estimate_memory(model, recipe, settings, None if available is None else available // shared), ""
    except UsageError:
        raise
    except Exception as error:  # whatever a model's own code raises; loading the model will name what is wrong with it
        logger.warning("%s: its memory cannot be estimated (%s)", folder, error)
        return None, f"{type(error).__name__}: {error}"


def is_too_large(estimate: MemoryEstimate | None) -> bool:
    """Whether a model is to be worked on block by block: it does not fit as a whole, or its size is not known."""
    if estimate is None:
        return True
    if estimate.whole.free is None:  # the system does not say what is free
        return False
    return estimate.whole.total - estimate.whole.program > USABLE * estimate.whole.free


def _limits(model: nn.Module, sites: Sites, recipe: Recipe, settings: Settings, bases: Bases) -> Limits:
    multiples = RankMultiples("none" if recipe.target == "none" else "cpu", recipe.rank_multiple)
    budget = Budget.of_recipe(model, sites, recipe)
    return largest_choices(sites, settings, recipe, recipe.keep, budget, multiples, bases)


def _stored(recipe: Recipe, elements: int) -> int:
    """Bytes of so many numbers in the stored type."""
    return elements * (getattr(torch, recipe.dtype).itemsize if recipe.dtype else FLOAT32)


@dataclass(frozen=True)
class _Text:
    """Tokens of the text, as far as they can be known before it is read: calibrating, in a batch, and refining."""

    all: int
    batch: int
    refined: int


def _text(model: nn.Module, recipe: Recipe) -> _Text:
    config: Any = getattr(model, "config", None)
    length = recipe.max_seq_length or min(
        DEFAULT_TOKENS, getattr(config, "max_position_embeddings", None) or DEFAULT_TOKENS
    )
    samples = recipe.num_samples or default_samples(model_kind(config, model))
    batch = recipe.batch_size * length if recipe.batch_size else max(DEFAULT_BATCH_SIZE * length, CPU_TOKENS)
    refined = recipe.refine_samples or REFINED * samples
    return _Text(samples * length, min(batch, samples * length), refined * length)


def vocabulary(model: nn.Module) -> int:
    """Classes of each token's prediction where these are a vocabulary; else 0."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    weight = getattr(head, "weight", None)
    return 0 if weight is None else len(weight)


def _logits(model: nn.Module, text: _Text) -> int:
    """What a batch's predictions take where they are over a vocabulary: two models', what is made of them in pieces."""
    numbers = text.batch * vocabulary(model)
    return FLOAT32 * (4 * numbers + 5 * min(numbers, PIECE))


def _disk(
    model: nn.Module,
    sites: Sites,
    settings: Settings,
    recipe: Recipe,
    factors: dict[str, int],
    stored: int,
    text: _Text,
) -> int:
    """Bytes for factors, modules, what the refit keeps, and hidden states."""
    needs = settings.needs(planned=recipe.plan is not None)
    streams = _waiting(model, sites, needs, text)
    total = sum(factors.values()) + 2 * stored  # in the journal, and as it is published
    if settings.refines:
        refined = replace(text, all=text.refined)
        total += stored + 2 * _waiting(model, sites, frozenset({"gram"}), refined)
    if settings.refit:
        kept = [kind for kind in statistics_named(needs).values() if kind.needs_backward]
        outputs = sum(kind.nbytes(*site.shape) for kind in kept for site in sites.chosen)
        total += stored + outputs + 2 * _waiting(model, sites, frozenset({"gram"}), text)
    return total + streams


def _waiting(model: nn.Module, sites: Sites, needs: frozenset[str], text: _Text) -> int:
    """Hidden states that wait between blocks: two blocks' on the way forwards, all blocks' for the way back."""
    config: Any = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None) or max(site.in_features for site in sites.chosen)
    steps = len(blocks_of([site.name for site in sites.chosen], model))
    return text.all * width * FLOAT32 * (steps + 2 if needs_backward(needs) else 2)
