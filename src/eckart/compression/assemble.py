"""Put the planned forms in place of the dense weights, block by block, in a copy of the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.allocation import DENSE, Choice, Plan
from eckart.calibration.layerwise import split_by_block
from eckart.checkpoint.mapped import SMALL, spool
from eckart.compression.factor_store import FactorStore
from eckart.compression.neuron_layers import SLICED
from eckart.compression.workspace import Workspace
from eckart.data.inference import progress
from eckart.forms import form_named
from eckart.model import (
    Site,
    WeightLoader,
    cast,
    dense_weight,
    deserialize_module,
    factored_modules,
    serialize_module,
    share_parameters,
    shared_clone,
    store_factors,
)
from eckart.storage.tensor_file import SUFFIX

logger = logging.getLogger(__name__)

STORED = "stored"
"""The stage of the modules of the published model."""


@dataclass(frozen=True)
class Assembly:
    """Builds a smaller copy of a model, and stores its finished modules on the way.

    Attributes:
        model: the original.
        sites: the weights that may be replaced.
        weights: loads the weights of the original where they are needed.
        workspace: stores the finished modules.
        dtype: type of the stored numbers; None for that of the model.
        stage: the stage of a run under which finished modules are stored.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    weights: WeightLoader
    workspace: Workspace
    dtype: torch.dtype | None
    stage: str = STORED

    def put_forms(self, plan: Plan, factors: FactorStore) -> tuple[PreTrainedModel, list[str]]:
        """Make a copy of the model with the planned forms in place, in the stored type.

        Returns:
            The copy, and notes of fallbacks.
        """
        compressed = shared_clone(self.model)
        by_name = {site.name: site for site in self.sites}
        chosen = {name: (name,) for name in by_name if plan.choices[name].form != DENSE}
        notes: list[str] = []
        place, processes = self.workspace, self.workspace.processes
        there = place.finished(self.stage)
        parts = split_by_block(chosen, self.model)
        for block, groups in progress(parts.items(), what="storing", total=len(parts)):
            name = block or "outside"
            with processes.failing_together():
                if processes.main and name not in there:
                    entry = self._serialize([by_name[site] for site in groups], plan, factors)
                    place.store.write(self.stage, name, *entry)
            content = self.share_entry(self.stage, name)
            notes += content["solved"] + self.install(compressed, self.stage, name)
            for note in content["notes"]:
                logger.warning(note)
        for first, *others in plan.bases:
            part = form_named(plan.choices[first].form).shared_parameter
            if part is None:  # they have neurons in common, not numbers
                continue
            share_parameters(compressed, {f"{name}.{part}": f"{first}.{part}" for name in others})
        if self.dtype is not None:
            cast(compressed, self.dtype, changed=self._move_to_file)
        set_lean(compressed, self.workspace.streaming)
        return compressed, notes

    def _move_to_file(self, module: nn.Module, name: str) -> None:
        """Write a large module that was cast to a file: its numbers are in memory now, and all together may not fit."""
        folder = self.workspace.scratch
        if folder is not None and sum(p.numel() for p in module.parameters(recurse=False)) > SMALL:
            spool(module, folder / f"cast-{name}{SUFFIX}", recurse=False)

    def _serialize(
        self, sites: Sequence[Site], plan: Plan, factors: FactorStore
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Build the modules of some sites from their factors, as one entry of the store."""
        tensors: dict[str, Tensor] = {}
        content: dict[str, Any] = {"sites": {}, "notes": [], "solved": []}
        smaller: dict[str, nn.Module] = {}  # of layers that lose neurons: all modules of one are made together
        for site in sites:
            choice = plan.choices[site.name]
            if choice.form == SLICED:
                if site.name not in smaller:
                    solved = factors.sliced(choice.basis or site.name)
                    smaller |= solved.modules(self.model, choice.rank, self.dtype)
                _pack(site.name, smaller.pop(site.name), tensors, content)
                continue
            old: Any = self.model.get_submodule(site.name)
            weight = dense_weight(old)
            left, right, mean, fallbacks = _factors_of(site.name, choice, factors)
            bias = old.bias.detach() if site.has_bias else None
            if bias is not None and mean is not None:
                # The metric was the covariance, so the error of the mean output is corrected in the bias.
                mean = mean.to(weight.device)
                one, other = (factor.to(weight.device).double() for factor in (left, right))
                rest = weight.double() @ mean - form_named(choice.form).times(one, other, mean, choice.block)
                bias = bias.double() + rest
            module, fallback = store_factors(
                site, choice.form, choice.rank, left, right, bias, self.dtype or weight.dtype, choice.block
            )
            if fallback is not None:
                content["notes"].append(fallback)
            content["solved"] += fallbacks
            _pack(site.name, module, tensors, content)
        return tensors, content

    def install(self, model: PreTrainedModel, stage: str, name: str) -> list[str]:
        """Put the modules of an entry into a model, and return the notes of the entry."""
        tensors, content = self.workspace.store.read(stage, name)
        for site, spec in content["sites"].items():
            own = {k.removeprefix(f"{site}/"): v for k, v in tensors.items() if k.startswith(f"{site}/")}
            deserialize_module(model, site, own, spec)
        return list(content["notes"])

    def share_entry(self, stage: str, name: str) -> dict[str, Any]:
        """Copy an entry of the first process to all others, and return its JSON values."""
        place = self.workspace
        if place.processes.size > 1:
            entry = place.store.read(stage, name) if place.processes.main else ({}, {})
            tensors, content = place.processes.broadcast(entry)
            if not place.processes.main and name not in place.store.entries(stage):
                place.store.write(stage, name, tensors, content)
        return place.store.read(stage, name)[1]


def _pack(name: str, module: nn.Module, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Add a module to an entry of the store."""
    packed, content["sites"][name] = serialize_module(module)
    tensors.update({f"{name}/{key}": value for key, value in packed.items()})


def _factors_of(
    name: str, choice: Choice, factors: FactorStore
) -> tuple[Tensor, Tensor, Tensor | None, tuple[str, ...]]:
    """B and A of a choice, the mean that its bias absorbs, and notes that concern this choice alone."""
    if form_named(choice.form).shared_by == "input":
        joint = factors.joint(choice.basis or name)
        return joint.lefts[name][:, : choice.rank], joint.right[: choice.rank], joint.means.get(name), ()
    solved = factors[name]
    found = solved.factors[choice.block]
    return *found.truncated(choice.rank), solved.mean, found.notes if len(solved.factors) > 1 else ()


def set_lean(model: nn.Module, lean: bool) -> None:
    """Let the forms of a model do without working memory, or let them use it."""
    for module in factored_modules(model).values():
        module.lean = lean
