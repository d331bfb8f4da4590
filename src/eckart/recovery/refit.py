"""The refit of a compressed model that is there already: in closed form, from its original.

`eckart compress` refits while the factors are made; here they come from a folder. The teacher holds the dense weights
and gives x, the student gives x~, and each factored weight is solved again at its own form and size (see
:mod:`eckart.compression.refit_groups`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.allocation import DENSE, Choice
from eckart.calibration.layerwise import HiddenStateStore, LayerwiseError, LayerwiseRunner, start_runner
from eckart.compression.refit_groups import Fit, GroupRefit, refittable
from eckart.data import Batch
from eckart.data.inference import device_of, evaluating, forward, progress
from eckart.errors import ModelError, UsageError
from eckart.forms import Factored, FactoredLinear, Sliced
from eckart.methods import METHODS
from eckart.model import (
    Site,
    SlicedFeatures,
    dense_weight,
    factored_modules,
    find_sites,
    shared_parameters,
    sliced_features,
)
from eckart.model.slicing import ATTRIBUTE
from eckart.moments import Moments, common_calls, shared_inputs
from eckart.recovery.base import ClosedFormRecovery, RecoveryContext

LISTED = 5
"""Names in a note; the report has them all."""


@dataclass
class Refit(ClosedFormRecovery):
    """`T = W + W E[(x - x~) x~^T] (E[x~ x~^T] + lambda I)^-1`, then the nearest T' of the form under `E[x~ x~^T]`.

    Layer by layer, in the order of the forward pass: each weight sees what those before it have become. W is the
    teacher's.

    Attributes:
        centered: minimize over covariances, and fold the means into the bias, where there is one.
        dense: also give weights that are not factored the target T, as it is.
    """

    name: ClassVar[str] = "refit"
    title: ClassVar[str] = "every factored weight solved again on the compressed model's own inputs; nothing is trained"
    paper: ClassVar[str] = "this library: the refit of `eckart compress`"
    use: ClassVar[str] = (
        "The model was compressed without a refit, by a method that has none or elsewhere. It needs the "
        "original and text, and no step of training."
    )
    needs_teacher: ClassVar[bool] = True

    centered: bool = True
    dense: bool = False

    def solve(
        self, model: PreTrainedModel, context: RecoveryContext, batches: Sequence[Batch], store: HiddenStateStore
    ) -> None:
        """Solve every site again that can be, in place.

        Raises:
            UsageError: the teacher is factored itself, or no weight of the student is one of its weights in a form.
            ModelError: one of the models cannot be run block by block.
            NumericalError: naming a site whose inputs are not finite.
        """
        teacher = context.teacher
        assert teacher is not None
        sites, self.left = self._sites(model, teacher)
        choices = _current_choices(model, sites)
        self.fits: dict[str, Fit] = {}
        self.tokens = sum(batch.num_tokens for batch in batches)
        first = batches[0].rows(0, 1)
        names = list(sites)
        with evaluating(teacher):
            groups = shared_inputs(teacher, names, lambda: forward(teacher, first.inputs))
            common = _find_common_calls(teacher, names, first)
        try:
            before = _start_runner(teacher, names, batches, store, "before")
            now = _start_runner(model, names, batches, store, "now")
            steps, notes = refittable(groups, before, sorted(common))
            work = GroupRefit(sites, choices, frozenset(names), self._moments(sites), METHODS["drone"], fits=self.fits)
            last = max(steps, default=-1)
            for step in progress(range(last + 1), what="refitting", total=last + 1):
                if step in steps:
                    notes += work.step(before, now, step, steps[step])[1]
                if step < last:
                    work.advance(before, now, step)
        except LayerwiseError as error:
            raise ModelError(
                f"recovery refit: {type(model).__name__} cannot be run block by block ({error}). Train it instead: "
                "--recovery distil"
            ) from error
        notes = [*_notes_of(self.left), *notes]
        if not self.fits:
            raise ModelError(
                f"recovery refit: no weight of {type(model).__name__} can be solved again ({'; '.join(notes)}). Train "
                "it instead: --recovery distil"
            )
        # The notes of `refittable` give the reason, for some of them by name.
        self.left |= dict.fromkeys([name for name in names if name not in self.fits], "its place in the model")
        context.notes += notes

    def report(self) -> dict[str, Any]:
        """How many sites were solved, how near their outputs were and are, and what was left."""
        found = list(self.fits.values())
        mean = {when: sum(getattr(fit, when) for fit in found) / max(1, len(found)) for when in ("before", "after")}
        return {
            "refitted": len(found),
            "of": len(found) + len(self.left),
            "tokens": self.tokens,
            "centered": self.centered,
            "output_error": mean,
            "sites": {name: {"before": fit.before, "after": fit.after} for name, fit in self.fits.items()},
            "left": self.left,
        }

    def _sites(self, model: PreTrainedModel, teacher: PreTrainedModel) -> tuple[dict[str, Site], dict[str, str]]:
        """The teacher's weights that the student holds in a form, and why others are left."""
        if factored_modules(teacher) or sliced_features(teacher):
            raise UsageError(
                f"--teacher: this {type(teacher).__name__} is factored itself, and a refit needs the weights that the "
                "factors were made of. Give the original: --teacher MODEL"
            )
        known = {site.name: site for site in find_sites(teacher).chosen}
        factored = factored_modules(model)
        left = {name: why for name, module in factored.items() if (why := _refusal(name, module, known)) is not None}
        sliced = sliced_features(model)
        readers = [n for n, found in sliced.items() if not found.rows and n in known and known[n].shape[1] == found.of]
        left |= {name: "which of its neurons are left is not known" for name in sliced if name not in readers}
        there = [name for name in (*factored, *readers) if name not in left]
        if not there:
            listed = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:LISTED])
            raise UsageError(
                f"recovery refit: {type(model).__name__} holds no factored weight that can be solved again"
                f"{f' ({listed})' if listed else ''}. Compress the model first (eckart compress MODEL), give the "
                "original that it was made from (--teacher MODEL), or train it: --recovery distil"
            )
        if self.dense:
            modules = dict(model.named_modules())
            there += [n for n, site in known.items() if n not in factored and _has_dense_weight(modules.get(n), site)]
        return {name: known[name] for name in known if name in set(there)}, left

    def _moments(self, sites: dict[str, Site]) -> Callable[[str], Moments]:
        """What the metric asks of a site besides its moved inputs: whether a bias takes up the means."""

        def moments(name: str) -> Moments:
            site = sites[name]
            return Moments(centered=self.centered and site.has_bias)

        return moments


def _start_runner(
    model: PreTrainedModel, names: Sequence[str], batches: Sequence[Batch], store: HiddenStateStore, name: str
) -> LayerwiseRunner:
    def context(_: str | None) -> AbstractContextManager[None]:
        return evaluating(model)

    first, device = batches[0].rows(0, 1), device_of(model)
    return start_runner(model, names, batches, first, store, context=context, device=device, name=name)


def _current_choices(model: nn.Module, names: Collection[str]) -> dict[str, Choice]:
    """Form and size of each site, and which other one holds what it shares."""
    ties = shared_parameters(model)
    choices: dict[str, Choice] = {}
    for name in names:
        module = model.get_submodule(name)
        part = getattr(module, "shared_parameter", None)
        source = ties.get(f"{name}.{part}")
        holder = source.removesuffix(f".{part}") if source is not None else None
        choice = _current_choice(module)
        choices[name] = choice if holder is None else with_changes(choice, basis=holder)
    return choices


def _current_choice(module: Any) -> Choice:
    """Form and size as they are."""
    sliced: SlicedFeatures | None = getattr(module, ATTRIBUTE, None)
    if sliced is not None:
        return Choice(Sliced.form, sliced.kept, (len(dense_weight(module)), 1))
    return Choice(module.form, module.rank, module.block) if isinstance(module, FactoredLinear) else Choice(DENSE)


def _refusal(name: str, module: Factored, known: dict[str, Site]) -> str | None:
    """Why a factored module cannot be solved again; None if it can."""
    if not isinstance(module, FactoredLinear):
        return f"form {module.form} is not a weight of a layer"
    if not module.refits:
        return f"form {module.form} cannot be"
    if name not in known:
        routed = any("expert" in part for part in name.split("."))
        return "a routed expert" if routed else "the teacher has no such weight"
    site = known[name]
    if site.shape != (module.out_features, module.in_features) or site.has_bias != module.has_bias:
        return (
            f"the teacher's is {site.out_features} x {site.in_features} {'with' if site.has_bias else 'without'} bias"
        )
    return None


def _has_dense_weight(module: Any, site: Site) -> bool:
    """Whether the student has a dense weight of the teacher's shape there."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    return tuple(dense_weight(module).shape) == site.shape and (module.bias is not None) == site.has_bias


def _find_common_calls(model: PreTrainedModel, names: Sequence[str], first: Batch) -> list[str]:
    """Sites that are also called on what all examples of a batch have in common."""
    twice = {key: torch.cat([value, value]) for key, value in first.inputs.items()}
    return list(common_calls(model, names, lambda: forward(model, first.inputs), lambda: forward(model, twice)))


def _notes_of(left: dict[str, str]) -> list[str]:
    """A note for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    return [
        f"not refitted, {why}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}"
        for why, names in reasons.items()
    ]
