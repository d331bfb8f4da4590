"""What all methods of a compression share: the model, its sites, the data, and what the data says of the sites."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.allocation import Bases, read_plan
from eckart.calibration import Calibration
from eckart.calibration.forward_context import forward_context
from eckart.calibration.layerwise import StatisticsWindow, all_blocks
from eckart.compression.basis_groups import adjacent, reading_a_norm
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings, check_metric_shares
from eckart.compression.workspace import Workspace
from eckart.data import CalibrationData, Pooling
from eckart.data.inference import forward
from eckart.errors import UsageError
from eckart.forms import form_named
from eckart.model import Sites, WeightLoader


class Timer:
    """Seconds that each step of a run took; statistics that are gathered inside another step are counted apart."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})

    @contextmanager
    def step(self, name: str, *, noted: bool = True) -> Iterator[None]:
        """Add the seconds that the body takes to a step; nothing is added unless `noted`."""
        start = time.perf_counter()
        yield
        if noted:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    @contextmanager
    def factorizing(self) -> Iterator[None]:
        """Time the factorization without the gathering of the statistics that it waits for."""
        before = self.seconds.get("calibration", 0.0)
        with self.step("factorization"):
            yield
        gathering = self.seconds.get("calibration", 0.0) - before
        self.seconds["factorization"] = round(self.seconds["factorization"] - gathering, 3)

    def gathering(self, windows: Iterator[StatisticsWindow]) -> Iterator[StatisticsWindow]:
        """Pass windows on, timing only how long each takes to gather."""
        while True:
            with self.step("calibration"):
                window = next(windows, None)
            if window is None:
                return
            yield window


@dataclass
class CompressionContext:
    """What all methods of a compression share.

    Attributes:
        model: the original, on the device that computes.
        tokenizer: published with the model.
        sites: the weights that can be factored.
        data: batches to calibrate on; None where no method reads any.
        held_out: batches kept back to measure quality on.
        calibration: the way to the statistics of the sites.
        pooling: how an embedding model pools its tokens.
        source_folder: where the model came from.
        fingerprint: of the model, written into plans.
        dtype_on_disk: the type of the original's stored numbers, if it came from a folder.
        workspace: where to compute and to keep intermediate results.
        weights: brings the original's weights to where they compute.
        timer: seconds of every step.
    """

    model: PreTrainedModel
    tokenizer: Any
    sites: Sites
    data: CalibrationData | None
    held_out: CalibrationData | None
    calibration: Calibration
    pooling: Pooling | None
    source_folder: Path | None
    fingerprint: str
    dtype_on_disk: torch.dtype | None
    workspace: Workspace
    weights: WeightLoader
    warnings: tuple[str, ...] = ()
    timer: Timer = field(default_factory=Timer)
    _reading_a_norm: frozenset[str] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the sites, in the order of the model."""
        return [site.name for site in self.sites.chosen]

    def adapt_settings(self, settings: Settings) -> Settings:
        """Return the settings; of the default method, those without gradients if the model has no backward pass."""
        return settings if self.calibration.backward_failed is None else settings.without_gradients()

    def bases(self, settings: Settings, recipe: Recipe) -> Bases:
        """Groups of sites that share a basis: as a plan says, or of adjacent layers that read a normalized input.

        Raises:
            UsageError: the metric does not allow it, or without data no small pass runs through the model.
        """
        if recipe.plan is not None:
            planned = read_plan(Path(recipe.plan), {site.name: site.shape for site in self.sites.chosen}).bases
            if planned:
                check_metric_shares(settings.method)
            return planned
        if form_named(settings.form).shared_parameter is None:
            return ()
        if self._reading_a_norm is None:
            self._reading_a_norm = self._find_norm_readers(settings)
        return adjacent(self.sites.chosen, self.model, recipe.layers_per_basis, self._reading_a_norm)

    def _find_norm_readers(self, settings: Settings) -> frozenset[str]:
        model = self.model
        inputs = self.data.batches[0].rows(0, 1).inputs if self.data is not None else None
        try:
            with forward_context(model, self.weights, all_blocks(model))(None):
                return reading_a_norm(
                    self.sites.chosen, model, lambda: forward(model, inputs or dict(model.dummy_inputs))
                )
        except Exception as error:
            if inputs is not None:
                raise
            raise UsageError(
                f"--form {settings.form}: no pass runs through {type(model).__name__} without data "
                f"({type(error).__name__}: {error}), and only a pass shows which weights read a normalized input. "
                "Give --data."
            ) from error
