"""Solve a group of sites again, in closed form, on the inputs that the compressed model gives it.

After earlier sites are compressed a site sees x~ where it saw x. Its target becomes the weight whose output on
x~ is nearest to the original output on x (:class:`~eckart.moments.input_shift.InputShift`), and the metric of its
inputs that of x~. Sites are visited in the order of the forward pass, so each sees all that came before it.
A site that the plan leaves dense is shift too: its target is stored as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from eckart.allocation import DENSE, Choice
from eckart.calibration.layerwise import Groups, LayerwiseRunner, split_by_segment
from eckart.distributed import Processes
from eckart.errors import NumericalError
from eckart.forms import FactoredLinear
from eckart.linalg import factorize
from eckart.methods import Method
from eckart.model import (
    Site,
    dense_weight,
    deserialize_module,
    replace_module,
    serialize_module,
    set_dense_weight,
    store_factors,
)
from eckart.moments import Moments, real_tokens
from eckart.moments.input_shift import InputShift


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
        choices: site -> form and rank; ranks stay.
        solved: the sites that have statistics.
        moments: returns the statistics of the original, of which those of the gradients are used again. Called by the
            first process only.
        method: its metric is applied to the shifted inputs.
        processes: share the batches.
        fits: filled with the error of each site before and after; None if that is not wanted.
    """

    sites: Mapping[str, Site]
    choices: Mapping[str, Choice]
    solved: Collection[str]
    moments: Callable[[str], Moments]
    method: Method
    processes: Processes = field(default_factory=Processes)
    fits: dict[str, Fit] | None = None

    def step(
        self, before: LayerwiseRunner, now: LayerwiseRunner, step: int, groups: Groups
    ) -> tuple[list[str], list[str]]:
        """Solve the sites of one step's block again, in place in the compressed model.

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
        for leader, members in groups.items():
            known = [name for name in members if name in self.solved]
            if not known:
                continue
            powers = dict.fromkeys(known, 0.0) if self.fits is not None else {}
            shift = self._pair_inputs(before, now, step, leader, powers)
            for name in known:
                found: list[str] = []
                failed: BaseException | None = None
                if self.processes.main:
                    try:
                        old = _linear(now.model.get_submodule(name)) if powers else None
                        found = self._solve(before.model, now.model, name, self.moments(name), shift)
                        if old is not None:
                            self._note_fit(before.model, now.model, name, shift, old, powers[name])
                    except Exception as error:
                        failed = error
                self.processes.raise_if_any_failed(failed)
                notes += self._to_all(now.model, name, found)
            changed += known
        return changed, notes

    def _pair_inputs(
        self, before: LayerwiseRunner, now: LayerwiseRunner, step: int, leader: str, powers: dict[str, float]
    ) -> InputShift:
        """Accumulate pairs of the inputs that a group reads in the original and in the compressed model.

        The sums of all processes end up at the first one. Each of the `powers` grows by the squared outputs of its site
        in the original.
        """
        shift = InputShift.empty(self.sites[leader].in_features, now.device)
        with self.processes.failing_together(), before.resident(step), now.resident(step):
            for batch in now.batches:
                x, y = before.capture_input(step, batch, leader), now.capture_input(step, batch, leader)
                if x.shape != y.shape:
                    raise NumericalError(
                        f"{leader} reads {tuple(x.shape)} in the original and {tuple(y.shape)} in the compressed model"
                    )
                x, y = real_tokens(x, batch), real_tokens(y, batch)
                shift.update(x, y, f"input of {leader} in the compressed model")
                for name in powers:
                    output = functional.linear(x.float(), *_linear(before.model.get_submodule(name)))
                    powers[name] += float(output.square().sum())
        if self.processes.size == 1:
            return shift
        state = shift.state()
        self.processes.reduce(state, 0)
        return InputShift.from_state(state)

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
            max(0.0, power + shift.count * shift.output_error(*truth, *linear)) / power if power else 0.0
            for linear in (old, _linear(compressed.get_submodule(name)))
        ]
        self.fits[name] = Fit(*near)

    def _to_all(self, model: nn.Module, name: str, notes: list[str]) -> list[str]:
        """Copy a module of the first process to all others, and return its notes."""
        if self.processes.size == 1:
            return notes
        tensors, spec = serialize_module(model.get_submodule(name)) if self.processes.main else ({}, {})
        tensors, content = self.processes.broadcast((tensors, {"spec": spec, "notes": notes}))
        if not self.processes.main:
            deserialize_module(model, name, tensors, content["spec"])
        return list(content["notes"])

    def _solve(
        self, original: nn.Module, compressed: nn.Module, name: str, moments: Moments, shift: InputShift
    ) -> list[str]:
        """Solve one site on its shifted inputs, put the module in place, and return notes."""
        site, choice = self.sites[name], self.choices[name]
        old: Any = original.get_submodule(name)
        current: Any = compressed.get_submodule(name)
        device = shift.gram.device
        weight = dense_weight(old).to(device).float()
        target = shift.target(weight, centered=moments.centered)
        bias = old.bias.detach().to(device) if site.has_bias else None
        notes: list[str] = []
        if choice.form == DENSE:
            stored = target
        else:
            now = moments.with_statistics({**moments.own, **shift.statistics()})
            solved = factorize(self.method.metric(target, now), name)
            notes.extend(solved.notes)
            left, right = solved.truncated(choice.rank)
            stored = left @ right
        if bias is not None and moments.centered:
            mean, shifted = shift.means()
            bias = bias.double() + weight.double() @ mean - stored.double() @ shifted
        if choice.form == DENSE:
            set_dense_weight(compressed, name, stored, bias)
            return notes
        dtype = next(p.dtype for p in current.parameters())
        module, fallback = store_factors(site, choice.form, choice.rank, left, right, bias, dtype)
        replace_module(compressed, name, module)
        return [*notes, fallback] if fallback is not None else notes


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
