"""Whether a model is worked on as a whole or block by block, what either takes, and the place that is set up for it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from eckart.allocation import Bases
from eckart.calibration.layerwise import all_blocks, blocks_of, split_by_block
from eckart.checkpoint.fingerprint import files_fingerprint
from eckart.checkpoint.load import blank
from eckart.compression.basis_groups import adjacent
from eckart.compression.budget import Budget
from eckart.compression.factor_store import STAGE as SOLVED
from eckart.compression.plan_builder import Limits, largest_choices
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings
from eckart.compression.workspace import Workspace
from eckart.config import DEFAULT_BATCH_SIZE, DEFAULT_TOKENS, default_samples
from eckart.data import model_kind
from eckart.distributed import OtherProcessError, Processes
from eckart.distributed.memory import PeakMemory, format_bytes, free_memory, rss
from eckart.errors import CheckpointError, EckartError, UsageError
from eckart.evaluation.divergence import PIECE
from eckart.forms import form_named
from eckart.model import ComputePlacement, Sites, find_sites, with_separate_experts
from eckart.moments import needs_backward, statistics_named
from eckart.moments.memory import solving_bytes, statistics_bytes
from eckart.storage.cache import Cache
from eckart.storage.journal import Journal
from eckart.storage.lock import output_path
from eckart.storage.record import RECORD

logger = logging.getLogger(__name__)

CACHE_MEMORY = 0.5
"""GB of hidden states that stay in memory, unless told otherwise."""

ROOM = 0.8
"""The part of free memory that a run may plan with."""

FLOAT32 = 4
# What does not change the result, and so may change between a run that was broken off and the one that goes on.
FREE = ("model", "revision", "data", "data_config", "data_split", "data_revision", "stream", "cache_memory", "device",
        "trust_remote_code")  # fmt: skip


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run takes, as a whole and block by block, in bytes.

    Attributes:
        whole: of memory, everything at once.
        streamed: of memory, block by block.
        disk: of room for the journal, the hidden states and the result, block by block.
        modules: the part of it that every process has.
        blocks: how many there are.
        at_once: how many blocks' statistics fit, where a model must be run as a whole.
    """

    whole: PeakMemory
    streamed: PeakMemory
    disk: int
    modules: int
    blocks: int
    at_once: int


def estimate_memory(model: PreTrainedModel, recipe: Recipe, settings: Settings, room: int | None) -> MemoryEstimate:
    """Estimate before anything is read.

    Args:
        model: may be on the meta device.
        recipe: what is asked for.
        settings: the method.
        room: bytes of free memory; None if nobody knows.
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
    bases = adjacent(sites.chosen, model, recipe.layers_per_basis) if form_named(settings.form).shared_parameter else ()
    together = [(sum(shapes[name][0] for name in group), shapes[group[0]][1]) for group in bases]
    solving = max(solving_bytes(*shape, needs) for shape in (*shapes.values(), *together))
    limits = _limits(model, sites, recipe, settings, bases)
    factors = {name: sum(c.factor_elements(*shapes[name]) for c in limits[name]) * FLOAT32 for name in shapes}
    in_block = max((sum(factors[n] for n in own) for own in groups.values()), default=0)
    budget = Budget.of_recipe(model, sites, recipe)
    stored = _stored(recipe, elements - sum(site.elements for site in sites.chosen) + budget.elements)
    text = _text(model, recipe)
    cache = int((recipe.cache_memory if recipe.cache_memory is not None else CACHE_MEMORY) * 1e9)
    width = max(columns for _, columns in shapes.values())
    running = text.batch * width * FLOAT32 * (8 if needs_backward(needs) else 4)
    logits = _logits(model, text)
    whole = PeakMemory(
        block=elements * FLOAT32 + stored,
        statistics=sum(statistics.values()),
        solving=solving + sum(factors.values()),
        text=running * (max(len(blocks), 1) if needs_backward(needs) else 1) + logits,
        program=rss(),
        free=room,
    )
    largest = max(per_block.values(), default=elements)
    inside = {id(part) for block in all_blocks(model) for part in model.get_submodule(block).modules()}
    own = (sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules() if id(m) not in inside)
    outside = max(own, default=0)  # one large module at a time: an embedding, a head
    streamed = PeakMemory(
        block=largest * FLOAT32,
        statistics=max(statistics.values(), default=0),
        solving=solving + in_block,
        text=min(cache, _waiting(model, sites, needs, text)) + running + logits,
        outside=outside * FLOAT32,
        program=rss(),
        free=room,
    )
    spare = (room or 0) * ROOM - whole.block - solving - running - logits
    at_once = int(spare // max(1, *statistics.values())) if needs else len(blocks)
    disk = _disk(model, sites, settings, recipe, factors, stored, text)
    # Inputs' statistics wait for the last layer of their group.
    disk += sum(statistics_bytes([shapes[n] for n in g[:-1]], [[i] for i in range(len(g) - 1)], needs) for g in bases)
    return MemoryEstimate(whole, streamed, disk, stored * (2 if settings.refit else 1), len(blocks), max(1, at_once))


@contextmanager
def workspace(
    folder: Path,
    output_dir: Path,
    recipe: Recipe,
    settings: Settings,
    processes: Processes,
    *,
    restart: bool = False,
    trust_remote_code: bool = False,
) -> Iterator[tuple[Workspace, str]]:
    """The place where a checkpoint is worked on.

    Args:
        folder: the checkpoint.
        output_dir: what will be published; an unfinished run's journal lies beside it.
        recipe: what is asked for.
        settings: the method.
        processes: who works.
        restart: throw an unfinished run away.
        trust_remote_code: the model brings its own code, and may.

    Yields:
        The place, and in words what was chosen and what it takes. A journal is removed when all went well, or if
        nothing was done.

    Raises:
        CheckpointError: an unfinished run was another one, or there is no room on the disk.
    """
    with processes.failing_together():
        needs = _tried(folder, recipe, settings, processes, trust_remote_code)
    unfinished = output_path(output_dir).with_name(f"{output_path(output_dir).name}.partial").is_dir()
    streaming = recipe.stream == "on" or (recipe.stream == "auto" and (unfinished or _too_large(needs)))
    at_once = needs.at_once if needs is not None else 1
    # Each process sees its own memory; all do as the first one does.
    streaming, at_once = processes.broadcast([streaming, at_once])
    on_accelerator = processes.device.type != "cpu"
    if not streaming:
        words = f"in memory, as a whole: {needs.whole}" if needs is not None else "in memory, as a whole"
        yield Workspace(processes=processes), words
        return
    compute = ComputePlacement(processes.device, None if on_accelerator else torch.float32)
    key = _key(folder, recipe, processes)
    target = output_path(output_dir)
    place = target if processes.main else target.with_name(f"{target.name}.rank{processes.rank}")
    with processes.failing_together():  # before any of them begins anew
        if restart and processes.main:
            _clear(target)
    with processes.failing_together():
        journal = Journal.open(place, key, restart=restart)
    try:
        with processes.failing_together():
            _check_space(journal, needs, processes)
        memory = int((recipe.cache_memory if recipe.cache_memory is not None else CACHE_MEMORY) * 1e9)
        cache = Cache(memory, journal.path("waiting"), durable=True)
        entries = len(journal.entries(SOLVED))
        words = "block by block" + (
            f": {needs.streamed}; {format_bytes(needs.disk)} of disk" if needs is not None else ""
        )
        if entries:
            words += f"; windows done already: {entries}"
        yield Workspace(compute, journal, cache, processes, at_once, journal.path("cast")), words
    except BaseException as error:
        refused = isinstance(error, EckartError) and not isinstance(error, CheckpointError | OtherProcessError)
        begun = journal.entries(SOLVED) if refused else (journal.folder / "entries").exists()
        if not begun:  # nothing to go on from, and nothing to be refused by
            journal.remove()
        raise
    cache.close()
    journal.remove()
    if processes.main:
        _clear(target)


def _clear(target: Path) -> None:
    """Remove what other processes of an earlier run, of which there were more, have left."""
    for folder in target.parent.glob(f"{target.name}.rank*.partial"):
        if (folder / RECORD).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def _check_space(journal: Journal, needs: MemoryEstimate | None, processes: Processes) -> None:
    """Refuse a disk that is too small, before hours of work; each process keeps modules of its own."""
    if needs is None:
        return
    # What an unfinished run has written already is not needed again.
    there = sum(file.stat().st_size for file in journal.folder.rglob("*") if file.is_file())
    needed = max(0, needs.disk - there) if processes.main else 0
    needed += (processes.size - 1) * needs.modules if processes.main else 0
    journal.check_space(needed, "the factors and hidden states of all blocks, and the result")


def _tried(
    folder: Path, recipe: Recipe, settings: Settings, processes: Processes, trust_remote_code: bool
) -> MemoryEstimate | None:
    """The estimate; None for a model that cannot be looked at without its weights."""
    try:
        model = blank(folder, trust_remote_code=trust_remote_code)
        # Processes of one machine share its memory; GPUs each have their own.
        shared = 1 if processes.device.type == "cuda" else processes.size
        room = free_memory(processes.device)
        return estimate_memory(model, recipe, settings, None if room is None else room // shared)
    except UsageError:
        raise
    except Exception as error:  # the model itself, with its numbers, will say what is wrong with it
        logger.info("%s: no estimate of memory (%s)", folder, error)
        return None


def _too_large(needs: MemoryEstimate | None) -> bool:
    if needs is None or needs.whole.free is None:
        return False
    return needs.whole.total - needs.whole.program > ROOM * needs.whole.free


def _key(folder: Path, recipe: Recipe, processes: Processes) -> dict[str, Any]:
    """What the result depends on; the text joins it when it has been read."""
    asked = {name: value for name, value in recipe.model_dump(mode="json").items() if name not in FREE}
    if recipe.plan is not None:
        asked["plan"] = Path(recipe.plan).read_text(encoding="utf-8")
    return {
        "model": files_fingerprint(folder),
        "eckart": version("eckart"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "processes": processes.size,
        "process": processes.rank,
        "device": processes.device.type,
        "options": {name: value for name, value in asked.items() if value is not None},
    }


def _limits(model: nn.Module, sites: Sites, recipe: Recipe, settings: Settings, bases: Bases) -> Limits:
    return largest_choices(sites, settings, recipe, recipe.keep, Budget.of_recipe(model, sites, recipe), bases)


def _stored(recipe: Recipe, elements: int) -> int:
    """Bytes of so many numbers in the stored type."""
    return elements * (getattr(torch, recipe.dtype).itemsize if recipe.dtype else FLOAT32)


@dataclass(frozen=True)
class _Text:
    """Tokens of the calibration text, as far as they can be known before it is read."""

    all: int
    batch: int


def _text(model: nn.Module, recipe: Recipe) -> _Text:
    config: Any = getattr(model, "config", None)
    length = recipe.max_seq_length or min(
        DEFAULT_TOKENS, getattr(config, "max_position_embeddings", None) or DEFAULT_TOKENS
    )
    samples = recipe.num_samples or default_samples(model_kind(config, model))
    return _Text(samples * length, (recipe.batch_size or DEFAULT_BATCH_SIZE) * length)


def _logits(model: nn.Module, text: _Text) -> int:
    """What a batch's predictions take where they are over a vocabulary: two models', what is made of them in pieces."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    weight = getattr(head, "weight", None)
    numbers = text.batch * len(weight) if weight is not None else 0
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
    """Room for factors, modules, what the refit keeps, and hidden states."""
    needs = settings.needs(planned=recipe.plan is not None)
    streams = _waiting(model, sites, needs, text)
    total = sum(factors.values()) + 2 * stored  # in the journal, and as it is published
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


def scratch(place: Workspace) -> Path:
    """Where weights are written that have no file of their own."""
    assert isinstance(place.store, Journal)
    return place.store.path("weights")
