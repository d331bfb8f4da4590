"""What comes before a run's long work: the model checked, its sites found, the data read, the statistics made ready."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.allocation import Bases, read_plan
from eckart.calibration import Calibration, calibrate, hold_out, without_data
from eckart.calibration.forward_context import ready
from eckart.calibration.layerwise import StatisticsWindow, all_blocks
from eckart.checkpoint.fingerprint import fingerprint, weights_checksum
from eckart.checkpoint.stored import stored_dtype, stored_tensors
from eckart.compression.basis_groups import adjacent, reading_a_norm
from eckart.compression.budget import Budget
from eckart.compression.factor_store import STAGE as SOLVED
from eckart.compression.plan_builder import Losses, make_plan
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings, check_metric_shares
from eckart.compression.workspace import Workspace
from eckart.config import DEFAULT_BATCH_SIZE, default_samples, resolve_device
from eckart.data import CalibrationData, Pooling, digest_batches, load_data, model_kind
from eckart.data.inference import forward
from eckart.errors import CheckpointError, UsageError
from eckart.forms import form_named
from eckart.linalg import require_finite
from eckart.methods import METHODS
from eckart.model import (
    Sites,
    WeightLoader,
    find_sites,
    has_output_head,
    saved_embedding_parameters,
    with_separate_experts,
)

TEXT = "text"
"""The stage of a run that holds what the calibration text was."""


@dataclass
class CompressionContext:
    """What all methods of a run share: the model, its sites, the data and what it says."""

    model: PreTrainedModel
    tokenizer: Any
    sites: Sites
    data: CalibrationData | None
    held: CalibrationData | None
    calibration: Calibration
    pooling: Pooling | None
    source_folder: Path | None
    mark: str
    stored_dtype: torch.dtype | None
    workspace: Workspace
    weights: WeightLoader
    seconds: dict[str, float] = field(default_factory=dict)
    reading: frozenset[str] | None = None

    @property
    def names(self) -> list[str]:
        """Of the sites."""
        return [site.name for site in self.sites.chosen]

    @contextmanager
    def clock(self, step: str) -> Iterator[None]:
        """Note the seconds of a step."""
        start = time.perf_counter()
        yield
        self.seconds[step] = round(self.seconds.get(step, 0.0) + time.perf_counter() - start, 3)

    def possible(self, settings: Settings) -> Settings:
        """The settings, or what is left of the default where no backward pass runs."""
        if self.calibration.backward_failed is None or "gradients" not in settings.needs():
            return settings
        drone = METHODS["drone"]
        method = with_changes(settings.method, metric=drone.metric, needs=drone.needs, exact_for=drone.exact_for)
        return with_changes(settings, method=method, allocation="uniform")

    def bases(self, settings: Settings, recipe: Recipe) -> Bases:
        """Which sites share a basis: as a plan says, or those of adjacent layers that read a normalized input.

        Raises:
            UsageError: the metric does not allow it, or without data no small pass through the model runs.
        """
        if recipe.plan is not None:
            planned = read_plan(Path(recipe.plan), {site.name: site.shape for site in self.sites.chosen}).bases
            if planned:
                check_metric_shares(settings.method)
            return planned
        if form_named(settings.form).shared_parameter is None:
            return ()
        if self.reading is None:
            self.reading = self._reading_a_norm(settings)
        return adjacent(self.sites.chosen, self.model, recipe.layers_per_basis, self.reading)

    def _reading_a_norm(self, settings: Settings) -> frozenset[str]:
        model = self.model
        inputs = self.data.batches[0].rows(0, 1).inputs if self.data is not None else None
        try:
            with ready(model, self.weights, all_blocks(model))(None):
                return reading_a_norm(
                    self.sites.chosen, model, lambda: forward(model, inputs or dict(model.dummy_inputs))
                )
        except Exception as error:
            if inputs is not None:
                raise
            raise UsageError(
                f"--form {settings.form}: no pass runs through {type(model).__name__} without data "
                f"({type(error).__name__}: {error}), and what reads a normalized input shows in one. Give --data."
            ) from error

    def timed(self, windows: Iterator[StatisticsWindow]) -> Iterator[StatisticsWindow]:
        """Windows, with the seconds of gathering them noted apart from what is made of them."""
        while True:
            with self.clock("calibration"):
                window = next(windows, None)
            if window is None:
                return
            yield window


def prepare(
    model: PreTrainedModel,
    tokenizer: Any,
    data: Any,
    recipe: Recipe,
    rows: Sequence[Settings],
    keeps: Sequence[float],
    source_folder: str | Path | None,
    workspace: Workspace,
) -> CompressionContext:
    """Everything up to the statistics, gathered once for all methods."""
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"model: {model if isinstance(model, str) else type(model).__name__} is no transformers model. Pass what "
            "from_pretrained returns; a name or folder goes to eckart.compress_checkpoint or the command line."
        )
    model = with_separate_experts(model)
    sites = find_sites(model, recipe.targets, recipe.ignore)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            require_finite(parameter.detach(), name)
    names = [site.name for site in sites.chosen]
    folder = Path(source_folder) if source_folder is not None else None
    pooling = Pooling.from_folder(folder) if folder is not None and not has_output_head(model) else None
    stored = stored_dtype(stored_tensors(folder)) if folder is not None else None
    device = resolve_device(recipe.device)
    if workspace.compute is None and (recipe.device != "auto" or device.type != "cpu"):
        model.to(device)  # type: ignore[arg-type]
    weights = WeightLoader(model, workspace.compute)
    unread = without_data(model, names)
    work = CompressionContext(
        model, tokenizer, sites, None, None, unread, pooling, folder, fingerprint(model), stored, workspace, weights
    )
    for row in rows:
        for keep in keeps:
            _can_be_met(work, row, recipe.model_copy(update={"keep": keep}))
    needs = frozenset().union(*(row.needs(planned=recipe.plan is not None) for row in rows))
    data = data if data is not None else recipe.data
    if not needs and data is None:
        return work
    with work.clock("data"):
        work.data, work.held = _data(model, tokenizer, data, recipe)
        _same_text(work)
    if needs:
        with work.clock("calibration"):
            work.calibration = calibrate(
                model,
                names,
                work.data,
                needs=needs,
                curvature=recipe.curvature,
                seed=recipe.seed,
                pooling=pooling,
                may_fall_back=all(row.method.name == "eckart" for row in rows if "gradients" in row.needs()),
                weights=weights,
                waiting=workspace.waiting,
                at_once=workspace.at_once,
                processes=workspace.processes,
            )
    return work


def _can_be_met(work: CompressionContext, settings: Settings, recipe: Recipe) -> None:
    """Refuse a budget that is too small, embeddings' too, or a plan file that does not fit, before any work is done."""
    sites = work.sites
    form = form_named(settings.form)
    flat: dict[str, Losses] = {
        site.name: {b: torch.zeros(form.full_rank(*site.shape, b) + 1) for b in form.blocks(*site.shape)}
        for site in sites.chosen
    }
    bases = adjacent(sites.chosen, work.model, recipe.layers_per_basis)  # at the most
    make_plan(sites, settings, recipe, flat, {}, Budget.of_recipe(work.model, sites, recipe), work.mark, bases)
    saved_embedding_parameters(
        work.model, recipe.embeddings, recipe.embeddings_keep, recipe.ignore
    )  # refuses what cannot be


def _data(
    model: PreTrainedModel, tokenizer: Any, data: Any, recipe: Recipe
) -> tuple[CalibrationData, CalibrationData | None]:
    """Batches to calibrate on, and others to measure on; N samples asked for are N that calibrate."""
    size = recipe.batch_size or DEFAULT_BATCH_SIZE
    wanted = recipe.num_samples or default_samples(model_kind(model.config, model))
    batches = -(-wanted // size)
    extra = max(1, batches // 8)
    loaded = load_data(
        data,
        tokenizer=tokenizer,
        model=model,
        config=recipe.data_config,
        split=recipe.data_split,
        column=recipe.data_column,
        target_column=recipe.data_target_column,
        label_column=recipe.data_label_column,
        revision=recipe.data_revision,
        num_samples=wanted + extra * size,
        max_seq_length=recipe.max_seq_length,
        batch_size=size,
        seed=recipe.seed,
    )
    return hold_out(loaded, min(extra, len(loaded) // 9 or int(len(loaded) > 1)))


def _same_text(work: CompressionContext) -> None:
    """Refuse to go on with an unfinished run on other text.

    Raises:
        CheckpointError: naming what differs.
    """
    assert work.data is not None
    store = work.workspace.store
    batches = [*work.data.batches, *(work.held.batches if work.held is not None else ())]
    now = {"sha256": digest_batches(batches), "num_tokens": sum(batch.num_tokens for batch in batches)}
    if work.workspace.streaming:
        now["weights"] = weights_checksum(work.model)
    if not store.entries(TEXT):
        if store.entries(SOLVED):
            raise CheckpointError(
                "the unfinished run of this output has lost the record of its text, so that what it has done cannot be "
                "gone on from. Pass --restart to throw it away, or choose another --output-dir."
            )
        store.write(TEXT, TEXT, {}, now)
    elif (before := store.read(TEXT, TEXT)[1]) != now:
        raise CheckpointError(
            f"the unfinished run of this output was calibrated on other text, tokens, labels or weights ({before}, now "
            f"{now}). Give the same --data, pass --restart to throw that run away, or choose another --output-dir."
        )
