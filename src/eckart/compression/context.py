"""What all methods of a compression share: the model, its sites, the data, and what the data says of the sites."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.allocation import DENSE, Bases, RankMultiples, read_plan
from eckart.calibration import UNREACHED, Calibration
from eckart.calibration.forward_context import forward_context
from eckart.calibration.layerwise import StatisticsWindow, all_blocks
from eckart.compression.basis_groups import adjacent, reading_a_norm
from eckart.compression.budget import describe_dense
from eckart.compression.factor_store import FactorSummary
from eckart.compression.joint_groups import JointGroups, joint_groups
from eckart.compression.neuron_layers import SLICED, Layers, check_planned, check_stock, find_layers
from eckart.compression.recipe import Recipe
from eckart.compression.settings import Settings, check_metric_shares
from eckart.compression.workspace import Workspace
from eckart.data import CalibrationData, Pooling
from eckart.data.inference import dummy_inputs, forward
from eckart.errors import UsageError
from eckart.forms import form_named
from eckart.model import Sites, WeightLoader
from eckart.moments import shared_inputs
from eckart.speed.profile import Profile


class Timer:
    """Seconds that each step of a run took; statistics that are gathered inside another step are counted apart.

    Attributes:
        seconds: step -> what it took.
        enter: is told the name of each step that begins, or goes on after another inside it.
    """

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self.enter: Callable[[str], None] = lambda name: None
        self._open: list[str] = []

    @contextmanager
    def step(self, name: str, *, noted: bool = True, told: bool = True) -> Iterator[None]:
        """Add the seconds that the body takes to a step.

        Args:
            name: of the step.
            noted: else nothing is added.
            told: else it begins after the first step inside it.

        Yields:
            Nothing.
        """
        start = time.perf_counter()
        self._open.append(name)
        if told:
            self.enter(name)
        try:
            yield
        finally:
            self._open.pop()
        if self._open:
            self.enter(self._open[-1])
        if noted:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    @contextmanager
    def factorizing(self) -> Iterator[None]:
        """Time the factorization without the gathering of the statistics that it waits for."""
        before = self.seconds.get("calibration", 0.0)
        with self.step("factorization", told=False):
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
        refining: the text that a refinement reads, that of the statistics among it; None where there is none.
        distilling: the same of a distillation.
        held_out: batches kept back to measure quality on.
        calibration: the way to the statistics of the sites.
        pooling: how an embedding model pools its tokens.
        source_folder: where the model came from.
        fingerprint: of the model, written into plans.
        dtype_on_disk: the type of the original's stored numbers, if it came from a folder.
        workspace: where to compute and to keep intermediate results.
        weights: brings the original's weights to where they compute.
        unmeasured: why outputs cannot be compared, once that has shown.
        timer: seconds of every step.
        profiles: forms -> seconds measured on this machine, where they were asked for.
    """

    model: PreTrainedModel
    tokenizer: Any
    sites: Sites
    data: CalibrationData | None
    refining: CalibrationData | None
    distilling: CalibrationData | None
    held_out: CalibrationData | None
    calibration: Calibration
    pooling: Pooling | None
    source_folder: Path | None
    fingerprint: str
    dtype_on_disk: torch.dtype | None
    workspace: Workspace
    weights: WeightLoader
    warnings: tuple[str, ...] = ()
    unmeasured: str | None = None
    timer: Timer = field(default_factory=Timer)
    profiles: dict[tuple[str, ...], Profile] = field(default_factory=dict)
    _reading_a_norm: frozenset[str] | None = None
    _reading_one_input: JointGroups | None = None
    _neuron_layers: Layers | None = None

    @property
    def names(self) -> list[str]:
        """Names of the sites, in the order of the model."""
        return [site.name for site in self.sites.chosen]

    def multiples(self, recipe: Recipe) -> RankMultiples:
        """What ranks are multiples of, for the target of the recipe; "auto" is the device that computes now."""
        here = "cuda" if self.weights.device.type == "cuda" else "cpu"
        return RankMultiples(here if recipe.target == "auto" else recipe.target, recipe.rank_multiple)

    def known_notes(self, settings: Settings, summary: FactorSummary, recipe: Recipe) -> list[str]:
        """What was not done as it was asked for, as far as is known once the sites are factored."""
        held = describe_dense(self.dense_sites(summary), self._shapes, recipe.keep_of)
        return [*([held] if held else []), *settings.notes, *self.calibration.notes, *summary.all_notes()]

    def dense_sites(self, summary: FactorSummary) -> dict[str, str]:
        """Sites that have no factors -> why they stay dense."""
        missing = [name for name in self.names if name not in summary.losses]
        return dict.fromkeys(missing, UNREACHED) | summary.dense

    def adapt_settings(self, settings: Settings) -> Settings:
        """Return the settings; of the default method, those without gradients if the model has no backward pass."""
        return settings if self.calibration.backward_failed is None else settings.without_gradients()

    def bases(self, settings: Settings, recipe: Recipe) -> Bases:
        """Groups of sites that share a basis: as a plan says, or of adjacent layers that read a normalized input.

        Raises:
            UsageError: the metric does not allow it, or without data no small pass runs through the model.
        """
        if recipe.plan is not None:
            planned = self._planned_groups(recipe.plan, "layers")
            if planned:
                check_metric_shares(settings.method)
            return planned
        kind = form_named(settings.factored_form)
        if kind.shared_parameter is None or kind.shared_by != "layers":
            return ()
        if self._reading_a_norm is None:
            self._reading_a_norm = self._find_norm_readers(settings)
        return adjacent(self.sites.chosen, self.model, recipe.layers_per_basis, self._reading_a_norm)

    def joint_groups(self, settings: Settings, recipe: Recipe) -> JointGroups:
        """Groups of sites that may have one input factor: as a plan says, or those of a block that read one tensor."""
        if recipe.plan is not None:
            return self._planned_groups(recipe.plan, "input")
        if not settings.joins:
            return ()
        if self._reading_one_input is None:
            self._reading_one_input = joint_groups(self._groups_by_input(), self.model)
        return self._reading_one_input

    def neuron_layers(self, settings: Settings, recipe: Recipe) -> Layers:
        """Feed-forward layers that may lose neurons, where the settings or a plan ask for that.

        Raises:
            UsageError: a plan slices something else, or `stock` is asked of a model whose configuration cannot say how
                wide they are.
        """
        planned = read_plan(Path(recipe.plan), self._shapes).choices if recipe.plan is not None else {}
        if not (SLICED in {choice.form for choice in planned.values()} if planned else settings.slices):
            return ()
        if self._neuron_layers is None:
            model, inputs = self.model, dummy_inputs(self.model)
            if self.data is not None:
                inputs = self.data.batches[0].rows(0, 1).inputs
            try:
                self._neuron_layers = find_layers(model, self.sites.chosen, inputs, self.weights)
            except Exception as error:
                self.calibration.note(f"no layer loses neurons: no small pass runs through the model ({error})")
                self._neuron_layers = ()
        check_planned(planned, self._neuron_layers, f"--plan {recipe.plan}")
        if recipe.stock:
            check_stock(self.model, self._neuron_layers)
        return self._neuron_layers

    @property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {site.name: site.shape for site in self.sites.chosen}

    def _planned_groups(self, plan: str, shared_by: str) -> JointGroups:
        """Groups of a plan; one that has been edited may leave a site alone with the factor of its group."""
        groups: dict[str, list[str]] = {}
        for name, choice in read_plan(Path(plan), self._shapes).choices.items():
            kind = None if choice.form == DENSE else form_named(choice.form)
            if kind is not None and kind.shared_parameter is not None and kind.shared_by == shared_by:
                groups.setdefault(choice.basis or name, []).append(name)
        least = 1 if shared_by == "input" else 2
        return [tuple(group) for group in groups.values() if len(group) >= least]

    def _groups_by_input(self) -> Mapping[str, Sequence[str]]:
        """Leader -> sites that read one tensor; without data, as a small pass through the model shows."""
        if self.data is not None:
            return self.calibration.groups
        model = self.model
        try:
            with forward_context(model, self.weights, all_blocks(model))(None):
                return shared_inputs(model, self.names, lambda: forward(model, dummy_inputs(model)), all_blocks(model))
        except Exception as error:
            self.calibration.note(f"no weights have one input factor: no small pass runs through the model ({error})")
            return {}

    def _find_norm_readers(self, settings: Settings) -> frozenset[str]:
        model = self.model
        inputs = self.data.batches[0].rows(0, 1).inputs if self.data is not None else None
        try:
            with forward_context(model, self.weights, all_blocks(model))(None):
                return reading_a_norm(self.sites.chosen, model, lambda: forward(model, inputs or dummy_inputs(model)))
        except Exception as error:
            if inputs is not None:
                raise
            raise UsageError(
                f"--form {settings.form}: no pass runs through {type(model).__name__} without data "
                f"({type(error).__name__}: {error}), and only a pass shows which weights read a normalized input. "
                "Give --data."
            ) from error
