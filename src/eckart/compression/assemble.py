"""From a plan and factors to a smaller model: forms put in place, and solved again on their own inputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.allocation import DENSE, Plan
from eckart.calibration import show_steps
from eckart.calibration.forward_context import ready
from eckart.calibration.layerwise import LayerwiseError, LayerwiseRunner, all_blocks, split_by_block
from eckart.calibration.layerwise.paired import advance, start_runner
from eckart.checkpoint.mapped import SMALL, spool
from eckart.compression.factor_store import FactorStore
from eckart.compression.refit_groups import GroupRefit, refittable
from eckart.compression.settings import Settings
from eckart.compression.workspace import Workspace
from eckart.data import Batch
from eckart.data.inference import progress
from eckart.distributed import Processes
from eckart.errors import ModelError
from eckart.forms import form_named
from eckart.model import (
    Site,
    WeightLoader,
    cast,
    dense_weight,
    deserialize_module,
    serialize_module,
    share_parameters,
    shared_clone,
    store_factors,
)
from eckart.moments import Moments
from eckart.storage.cache import SUFFIX

logger = logging.getLogger(__name__)

STORED, REFITTED = "stored", "refitted"
"""Stages of a run, as its store names them."""


@dataclass(frozen=True)
class Assembly:
    """A model and the place where a smaller copy of it is put together.

    Attributes:
        model: the original.
        sites: what may be replaced.
        weights: of the original, brought in as they are needed.
        workplace: where things are kept.
        dtype: of stored numbers; None for the model's own.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    weights: WeightLoader
    workspace: Workspace
    dtype: torch.dtype | None

    def put(self, plan: Plan, shelf: FactorStore) -> tuple[PreTrainedModel, list[str]]:
        """A copy of the model with the planned forms in place, in the stored dtype, and notes of fallbacks."""
        compressed = shared_clone(self.model)
        by_name = {site.name: site for site in self.sites}
        chosen = {name: (name,) for name in by_name if plan.choices[name].form != DENSE}
        notes: list[str] = []
        place, processes = self.workspace, self.workspace.processes
        there = processes.broadcast(({}, {"there": place.store.entries(STORED)}))[1]["there"]
        parts = split_by_block(chosen, self.model)
        for block, groups in progress(parts.items(), what="storing", total=len(parts)):
            name = block or "outside"
            with processes.failing_together():
                if processes.main and name not in there:
                    place.store.write(STORED, name, *self._stored([by_name[site] for site in groups], plan, shelf))
            content = self._to_all(STORED, name)
            notes += content["solved"] + self._install(compressed, STORED, name)
            for note in content["notes"]:
                logger.warning(note)
        for first, *others in plan.bases:
            part = form_named(plan.choices[first].form).shared_parameter
            share_parameters(compressed, {f"{name}.{part}": f"{first}.{part}" for name in others})
        if self.dtype is not None:
            cast(compressed, self.dtype, changed=self._moved_away)
        return compressed, notes

    def refitted(
        self,
        compressed: PreTrainedModel,
        plan: Plan,
        shelf: FactorStore,
        settings: Settings,
        groups: Mapping[str, Sequence[str]],
        batches: Sequence[Batch],
        solved: Sequence[str],
        leave: Sequence[str],
    ) -> tuple[PreTrainedModel, list[str]]:
        """A copy of the smaller model, every site solved again on the inputs that the copy gives it.

        Args:
            compressed: as :meth:`put` made it; not changed.
            plan: ranks stay.
            shelf: statistics of the original's outputs.
            settings: the method.
            groups: leader -> members.
            batches: of all processes.
            solved: sites that have statistics.
            leave: sites that read more than one input.

        Returns:
            The copy, and notes of what was left as it was.
        """
        fitted = shared_clone(compressed)
        place, processes = self.workspace, self.workspace.processes
        walks = self._walks(fitted, [n for members in groups.values() for n in members], batches)
        if isinstance(walks, str):
            return compressed, [f"the refit was left out: {walks}"]
        before, now = walks
        steps, notes = refittable(groups, before, leave)

        def moments(name: str) -> Moments:
            found = shelf[name].moments
            assert found is not None, "statistics are kept where a refit is asked for"
            return Moments.from_state({k: v.to(self.weights.device) for k, v in found.state().items()})

        work = GroupRefit(
            {site.name: site for site in self.sites}, plan.choices, frozenset(solved), moments, settings.method,
            processes,
        )  # fmt: skip
        there = set(processes.broadcast(({}, {"there": place.store.entries(REFITTED)}))[1]["there"])
        last = max(steps, default=-1)
        done = [step for step in sorted(steps) if str(step) in there]
        for step in done:
            self._to_all(REFITTED, str(step))
            notes += self._install(fitted, REFITTED, str(step))
        first = next((step for step in sorted(steps) if str(step) not in there), last + 1)
        start = _start(first, before, now, processes) if 0 < first <= last else first
        try:
            for step in show_steps(range(start, last + 1), "refitting"):
                if step in steps and str(step) not in there:
                    changed, found = work.step(before, now, step, steps[step])
                    # Killed between the two writes, another process may be one entry ahead of the first.
                    if processes.main or (str(step) not in place.store.entries(REFITTED)):
                        place.store.write(REFITTED, str(step), *_packed(fitted, changed, found))
                    notes += self._install(fitted, REFITTED, str(step))
                advance((before, now), step)
        except LayerwiseError as error:  # other text takes another way than the example that was tried
            why = f"{type(self.model).__name__} cannot be walked block by block ({error})"
            if processes.size > 1:  # the others go on walking
                raise ModelError(f"{why}. Leave the refit out with --no-refit.") from error
            fitted, notes = compressed, [f"the refit was left out: {why}"]
        before.forget_all()
        now.forget_all()
        return fitted, notes

    def _moved_away(self, module: nn.Module, name: str) -> None:
        """What has been cast lies in memory: of a model that is larger, it is written to a file."""
        folder = self.workspace.scratch
        if folder is not None and sum(p.numel() for p in module.parameters(recurse=False)) > SMALL:
            spool(module, folder / f"cast-{name}{SUFFIX}", recurse=False)

    def _walks(
        self, fitted: PreTrainedModel, names: Sequence[str], batches: Sequence[Batch]
    ) -> tuple[LayerwiseRunner, LayerwiseRunner] | str:
        """The original and the copy, each before its first step; or why they cannot be walked."""
        place = self.workspace
        waiting = place.hidden_state_cache()
        first = batches[0].rows(0, 1)
        mine = place.processes.own_part(batches)
        made: list[LayerwiseRunner] = []
        for name, model, weights in (
            ("before", self.model, self.weights),
            ("now", fitted, WeightLoader(fitted, place.compute_stored)),
        ):
            held = ready(model, weights, all_blocks(model))
            try:
                made.append(
                    start_runner(model, names, mine, first, waiting, held=held, device=weights.device, name=name)
                )
            except LayerwiseError as error:
                return f"{type(model).__name__} cannot be walked block by block ({error})"
        return made[0], made[1]

    def _stored(
        self, sites: Sequence[Site], plan: Plan, shelf: FactorStore
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The modules of some sites, packed."""
        tensors: dict[str, Tensor] = {}
        content: dict[str, Any] = {"sites": {}, "notes": [], "solved": []}
        for site in sites:
            choice, solved = plan.choices[site.name], shelf[site.name]
            old: Any = self.model.get_submodule(site.name)
            weight = dense_weight(old)
            left, right = solved.factors[choice.block].truncated(choice.rank)
            bias = old.bias.detach() if site.has_bias else None
            if bias is not None and solved.mean is not None:
                # The metric was the covariance: the mean's share of the error goes into the bias.
                mean = solved.mean.to(weight.device)
                one, other = (factor.to(weight.device).double() for factor in (left, right))
                rest = weight.double() @ mean - form_named(choice.form).times(one, other, mean, choice.block)
                bias = bias.double() + rest
            module, fallback = store_factors(
                site, choice.form, choice.rank, left, right, bias, self.dtype or weight.dtype, choice.block
            )
            if fallback is not None:
                content["notes"].append(fallback)
            if len(solved.factors) > 1:
                content["solved"] += solved.factors[choice.block].notes
            packed, spec = serialize_module(module)
            content["sites"][site.name] = spec
            tensors |= {f"{site.name}/{key}": value for key, value in packed.items()}
        return tensors, content

    def _install(self, model: PreTrainedModel, stage: str, name: str) -> list[str]:
        """Put an entry's modules into a model; returns its notes."""
        tensors, content = self.workspace.store.read(stage, name)
        for site, spec in content["sites"].items():
            own = {k.removeprefix(f"{site}/"): v for k, v in tensors.items() if k.startswith(f"{site}/")}
            deserialize_module(model, site, own, spec)
        return list(content["notes"])

    def _to_all(self, stage: str, name: str) -> dict[str, Any]:
        """Give every process an entry of the first one; returns its content."""
        place = self.workspace
        if place.processes.size > 1:
            entry = place.store.read(stage, name) if place.processes.main else ({}, {})
            tensors, content = place.processes.broadcast(entry)
            if not place.processes.main and name not in place.store.entries(stage):
                place.store.write(stage, name, tensors, content)
        return place.store.read(stage, name)[1]


def _start(first: int, before: LayerwiseRunner, now: LayerwiseRunner, processes: Processes) -> int:
    """The last step up to `first` that both walks can begin at in all processes."""
    waits = [float(before.waits_at(step) and now.waits_at(step)) for step in range(first)]
    found = {"waits": torch.tensor(waits)}
    processes.all_reduce(found)
    return next((step for step in range(first, 0, -1) if int(found["waits"][step - 1]) == processes.size), 0)


def _packed(model: PreTrainedModel, names: Sequence[str], notes: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    specs: dict[str, Any] = {}
    for name in names:
        packed, specs[name] = serialize_module(model.get_submodule(name))
        tensors |= {f"{name}/{key}": value for key, value in packed.items()}
    return tensors, {"sites": specs, "notes": notes}
