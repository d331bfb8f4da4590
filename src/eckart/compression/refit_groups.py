"""Solve a group of sites again, in closed form, on the inputs that the compressed model gives it.

After earlier sites are compressed a site sees x~ where it saw x. Its target becomes the weight whose output on
x~ is nearest to the original output on x (:class:`~eckart.moments.input_shift.InputShift`), and the metric of its
inputs that of x~. Sites are visited in the order of the forward pass, so each sees all that came before it.
A site that the plan leaves dense is shifted too: its target is stored as it is. Sites that share a parameter are solved
together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eckart.allocation import DENSE, Choice
from eckart.calibration.layerwise import Groups, KeptTensors, LayerwiseRunner, split_by_segment
from eckart.compression.input_pairs import InputPairs, widened
from eckart.compression.refit_slices import refit_reader
from eckart.compression.settings import SLICED
from eckart.distributed import Processes
from eckart.forms import FactoredLinear, form_named
from eckart.linalg import factorize, factorize_jointly
from eckart.methods import Method
from eckart.model import (
    Site,
    dense_weight,
    deserialize_module,
    replace_module,
    serialize_module,
    set_dense_weight,
    share_parameters,
    store_factors,
)
from eckart.moments import Halving, Moments
from eckart.moments.input_shift import InputShift, Regression


@dataclass(frozen=True)
class Fit:
    """Relative error of a site's output in the compressed model, before and after its refit.

    `E || y - y~ ||^2 / E || y ||^2`, y of the original model and y~ of the compressed one, over all tokens.

    Attributes:
        before: with the weight that was there.
        after: with the one that was found.
    """

    before: float
    after: float


@dataclass(frozen=True)
class GroupRefit:
    """Solves groups of sites again.

    Attributes:
        sites: all sites, by name.
        choices: site -> form and rank; ranks stay. Sites that share a parameter are solved together.
        solved: the sites that have statistics.
        moments: returns the statistics of the original, of which those of the gradients are used again. Called by the
            first process only.
        method: its metric is applied to the shifted inputs.
        processes: share the batches.
        fits: filled with the error of each site before and after; None if that is not wanted.
        spare: bytes that may be kept between the passes through one block, asked at every block; what does not fit is
            computed again.
        halving: how batches are run.
        rows: returns numbers of the rows that are left of a weight that makes neurons, where some were taken away.
            Called by the first process only.
    """

    sites: Mapping[str, Site]
    choices: Mapping[str, Choice]
    solved: Collection[str]
    moments: Callable[[str], Moments]
    method: Method
    processes: Processes = field(default_factory=Processes)
    fits: dict[str, Fit] | None = None
    spare: Callable[[], int] = lambda: 0
    halving: Halving = field(default_factory=Halving)
    rows: Callable[[str], Tensor | None] = lambda name: None
    _pairs: dict[int, InputPairs] = field(default_factory=dict, repr=False)

    def step(
        self, before: LayerwiseRunner, now: LayerwiseRunner, step: int, groups: Groups
    ) -> tuple[list[str], list[str]]:
        """Solve the sites of one step's block again, in place in the compressed model.

        What was kept meanwhile is dropped by :meth:`advance`, which follows.

        Args:
            before: runs the original, and has finished the step before this one.
            now: the same for the compressed model.
            step: number of the block.
            groups: leader -> members, those inside the step's block.

        Returns:
            Names of the sites that have changed, and notes of fallbacks.
        """
        changed: list[str] = []
        notes: list[str] = []
        todo: dict[str, list[tuple[str, ...]]] = {}
        for leader, members in groups.items():
            known = [name for name in members if name in self.solved]
            sets, left = self._sets(known)
            notes += left
            if sets:
                todo[leader] = sets
        if not todo:
            return changed, notes
        pairs = InputPairs(before, now, step, list(todo), KeptTensors(self.spare()), self.halving)
        self._pairs[step] = pairs
        for leader, sets in todo.items():
            known = [name for names in sets for name in names]
            powers = {name: 0.0 for name in known if self.fits is not None}
            shift = self._pair_inputs(pairs, leader, powers)
            regression = Regression(shift)
            for names in sets:
                more = names != sets[-1]
                notes += self._solve_everywhere(before.model, now.model, names, regression, powers, more)
            changed += known
            pairs.solved += known
        return changed, notes

    def advance(self, before: LayerwiseRunner, now: LayerwiseRunner, step: int) -> None:
        """Bring both models to the end of a step, whether or not there was anything to solve in it."""
        if (pairs := self._pairs.pop(step, None)) is not None:
            pairs.finish()
        else:
            for runner in (before, now):
                runner.advance(step, self.halving)

    def _sets(self, known: Sequence[str]) -> tuple[list[tuple[str, ...]], list[str]]:
        """Sites of a group that are solved together, and notes of those that cannot be."""
        sharing: dict[str, list[str]] = {}
        for name, choice in self.choices.items():
            if choice.basis is not None and choice.form != SLICED:
                sharing.setdefault(choice.basis, [choice.basis]).append(name)
        sets: dict[str, tuple[str, ...]] = {}
        notes: list[str] = []
        for name in known:
            first = name if self.choices[name].form == SLICED else self.choices[name].basis or name
            together = tuple(sharing.get(first, (name,)))
            if set(together) <= set(known):
                sets[first] = together
            else:
                other = next(member for member in together if member not in known)
                notes.append(f"{name}: not refitted, {other} shares its input factor and cannot be")
        return list(sets.values()), notes

    def _pair_inputs(self, pairs: InputPairs, leader: str, powers: dict[str, float]) -> InputShift:
        """Accumulate pairs of the inputs that a group reads in the original and in the compressed model.

        The sums of all processes end up at the first one. Each of the `powers` grows by the squared outputs of its site
        in the original.
        """
        shift = InputShift.empty(self.sites[leader].in_features, pairs.now.device)
        linears = {name: _linear(pairs.before.model.get_submodule(name)) for name in powers}
        sums: list[Tensor] = []

        def add(x: Tensor, y: Tensor) -> None:
            squares = [
                functional.linear(x.float(), *linear).square().sum(dtype=torch.float64) for linear in linears.values()
            ]
            shift.update(x, y)
            if squares:
                sums.append(torch.stack(squares))

        with self.processes.failing_together():
            pairs.for_each(leader, add)
            shift.require_finite(leader)
        if sums:
            powers |= dict(zip(powers, torch.stack(sums).sum(0).tolist(), strict=True))
        if self.processes.size == 1:
            return shift
        state = shift.state()
        self.processes.reduce(state, 0)
        return InputShift.from_state(state)

    def _solve_everywhere(
        self,
        original: nn.Module,
        compressed: nn.Module,
        names: Sequence[str],
        regression: Regression,
        powers: Mapping[str, float],
        more: bool,
    ) -> list[str]:
        """Solve a set of sites at the first process, put their modules in place at all of them, and return notes."""
        notes: list[str] = []
        failed: BaseException | None = None
        if self.processes.main:
            try:
                old = {name: _linear(compressed.get_submodule(name)) for name in names if name in powers}
                notes = self._solve(original, compressed, names, regression, more)
                for name, linear in old.items():
                    self._note_fit(original, compressed, name, regression.shift, linear, powers[name])
            except Exception as error:
                failed = error
        self.processes.raise_if_any_failed(failed)
        return self._to_all(compressed, names, notes)

    def _note_fit(
        self,
        original: nn.Module,
        compressed: nn.Module,
        name: str,
        shift: InputShift,
        old: tuple[Tensor, Tensor | None],
        power: float,
    ) -> None:
        """Write down how near a site's output was with its old weight, and is."""
        assert self.fits is not None
        truth = _linear(original.get_submodule(name))
        near = [
            max(0.0, power + shift.count * shift.output_error(*truth, widened(weight, truth[0].shape[1]), bias)) / power
            if power
            else 0.0
            for weight, bias in (old, _linear(compressed.get_submodule(name)))
        ]
        self.fits[name] = Fit(*near)

    def _to_all(self, model: nn.Module, names: Sequence[str], notes: list[str]) -> list[str]:
        """Copy modules of the first process to all others, and return its notes; what they share is shared again."""
        if self.processes.size > 1:
            for name in names:
                tensors, spec = serialize_module(model.get_submodule(name)) if self.processes.main else ({}, {})
                tensors, content = self.processes.broadcast((tensors, {"spec": spec, "notes": notes}))
                if not self.processes.main:
                    deserialize_module(model, name, tensors, content["spec"])
                notes = list(content["notes"])
        share_bases(model, [names], self.choices)
        return notes

    def _solve(
        self, original: nn.Module, compressed: nn.Module, names: Sequence[str], regression: Regression, more: bool
    ) -> list[str]:
        """Solve some sites together on their shifted inputs, put the modules in place, and return notes.

        Args:
            original: its weights are what the sites should do.
            compressed: is changed.
            names: sites; one, or all that share a parameter.
            regression: of the group's inputs.
            more: whether the group has sites still to be solved.
        """
        shift = regression.shift
        if self.choices[names[0]].form == SLICED:
            return self._solve_sliced(original, compressed, names[0], regression)
        olds: list[Any] = [original.get_submodule(name) for name in names]
        weights = [dense_weight(old).to(shift.gram.device).float() for old in olds]
        moments = [self.moments(name) for name in names]
        pairs = list(zip(weights, moments, strict=True))
        targets = [regression.target(weight, centered=entry.centered) for weight, entry in pairs]
        if not more:
            regression.forget()
        notes: list[str] = []
        factors: list[tuple[Tensor, Tensor] | None] = [None]
        if self.choices[names[0]].form != DENSE:
            seen = shift.statistics()
            problems = [
                self.method.metric(target, entry.with_statistics({**entry.own, **seen}))
                for target, entry in zip(targets, moments, strict=True)
            ]
            if len(names) > 1:
                solved = factorize_jointly(problems, " and ".join(names))
            else:
                solved = [factorize(problems[0], names[0])]
            notes += [note for found in solved for note in found.notes]
            factors = [found.truncated(self.choices[name].rank) for name, found in zip(names, solved, strict=True)]
        for name, old, weight, entry, target, pair in zip(names, olds, weights, moments, targets, factors, strict=True):
            stored = target if pair is None else pair[0] @ pair[1]
            bias = old.bias.detach().to(stored.device) if self.sites[name].has_bias else None
            if bias is not None and entry.centered:
                mean, shifted = shift.means()
                bias = bias.double() + weight.double() @ mean - stored.double() @ shifted
            if pair is None:
                set_dense_weight(compressed, name, stored, bias)
            else:
                notes += self._store(compressed, name, pair, bias)
        return notes

    def _solve_sliced(self, original: nn.Module, compressed: nn.Module, name: str, regression: Regression) -> list[str]:
        """Solve a weight that makes or reads neurons some of which were taken away."""
        shift, old = regression.shift, original.get_submodule(name)
        rows, centered = self.rows(name), self.moments(name).centered
        weight, bias = (None if part is None else part.to(shift.gram.device).float() for part in _linear(old))
        assert weight is not None
        if rows is None:
            now, _ = _linear(compressed.get_submodule(name))
            stored = refit_reader(shift, weight, now, centered=centered)
        else:
            weight, bias = weight[rows.to(weight.device)], None if bias is None else bias[rows.to(bias.device)]
            stored = regression.target(weight, centered=centered).double()
        if bias is not None and centered:
            mean, moved = shift.means()
            bias = bias.double() + weight.double() @ mean - stored @ moved[: stored.shape[1]]
        set_dense_weight(compressed, name, stored, bias)
        return []

    def _store(
        self, compressed: nn.Module, name: str, factors: tuple[Tensor, Tensor], bias: Tensor | None
    ) -> list[str]:
        """Put a factored module in place, and return the note of a fallback."""
        choice = self.choices[name]
        dtype = next(p.dtype for p in compressed.get_submodule(name).parameters())
        module, fallback = store_factors(self.sites[name], choice.form, choice.rank, *factors, bias, dtype)
        replace_module(compressed, name, module)
        return [] if fallback is None else [fallback]


def share_bases(model: nn.Module, groups: Sequence[Sequence[str]], choices: Mapping[str, Choice]) -> None:
    """Let the members of each group share what its first one holds, in a model where each has its own copy.

    Args:
        model: changed in place.
        groups: sites that were solved together, the one that holds the shared parameter first.
        choices: how they are stored.
    """
    for first, *others in groups:
        part = form_named(choices[first].form).shared_parameter if others else None
        if part is None:  # alone, or they have neurons in common and not numbers
            continue
        share_parameters(model, {f"{name}.{part}": f"{first}.{part}" for name in others})


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    """The dense weight (out, in) and bias of a module, in whatever form it is stored."""
    if isinstance(module, FactoredLinear):
        weight, bias = module.to_dense().detach(), module.dense_bias()
    else:
        weight, bias = dense_weight(module), module.bias
    return weight, None if bias is None else bias.detach()


def refittable(
    groups: Mapping[str, Sequence[str]], runner: LayerwiseRunner, leave: Collection[str]
) -> tuple[dict[int, Groups], list[str]]:
    """Assign each group to the step of the block that reads its input.

    Args:
        groups: leader -> members, in order of the forward pass.
        runner: of the original model.
        leave: sites whose input is not one tensor a pass.

    Returns:
        Step -> groups, and notes of what is left as it is.
    """
    schedule = runner.schedule
    steps: dict[int, Groups] = {}
    notes = [f"{name}: not refitted, it reads more than one input" for name in leave]
    outside: list[str] = []
    several: list[str] = []
    routed: list[str] = []
    for leader, members in split_by_segment(groups, schedule).items():
        if set(members) & set(leave):
            continue
        if leader in schedule.between:
            outside.append(leader)
        elif len(schedule.segments[leader]) > 1:
            several.append(leader)
        elif any("expert" in part for part in leader.split(".")):
            routed.append(leader)  # the compressed model sends it other tokens, so that they come in no pairs
        else:
            steps.setdefault(schedule.segments[leader][0], {})[leader] = members
    if several:
        notes.append(f"not refitted, called by several layers: {', '.join(several[:5])}")
    if routed:
        notes.append(f"not refitted, routed experts: {', '.join(routed[:5])}")
    if outside:
        notes.append(f"not refitted, outside the blocks: {', '.join(outside[:5])}")
    return steps, notes
