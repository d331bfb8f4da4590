"""Refit in closed form: every site is solved again on the inputs that the compressed model gives it.

After earlier sites are compressed a site sees x~ where it saw x. Its target becomes the weight whose output on
x~ is nearest to the original output on x (:class:`~eckart.moments.input_shift.InputShift`), and the metric of its
inputs that of x~. Sites are visited in the order of the forward pass, so each sees all that came before it.
A site that the plan leaves dense is moved too: its target is stored as it is.
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
    """How far a site's output in the compressed model was from the original's, and is, relative to its size.

    `E || y - y~ ||^2 / E || y ||^2`, y of the original model and y~ of the compressed one, over all tokens.

    Attributes:
        before: with the weight that was there.
        after: with the one that was found.
    """

    before: float
    after: float


@dataclass(frozen=True)
class GroupRefit:
    """What is needed to solve sites again.

    Attributes:
        sites: all sites, by name.
        choices: site -> form and rank; ranks stay.
        solved: the sites that have statistics.
        moments: gives those of the original model; the gradient side is used again. Asked by the first process alone.
        method: its metric is used on the moved inputs.
        processes: share the batches.
        fits: site -> how near it was and is, noted there by a single process; None where nobody asks.
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
            before: the walk through the original model, with the step before done.
            now: the same for the compressed model.
            step: which step.
            groups: leader -> members, those inside the step's block.

        Returns:
            Names of the sites that were stored anew, and notes of fallbacks.
        """
        changed: list[str] = []
        notes: list[str] = []
        for leader, members in groups.items():
            known = [name for name in members if name in self.solved]
            if not known:
                continue
            powers = dict.fromkeys(known, 0.0) if self.fits is not None else {}
            moved = self._seen(before, now, step, leader, powers)
            for name in known:
                found: list[str] = []
                failed: BaseException | None = None
                if self.processes.main:
                    try:
                        old = _linear(now.model.get_submodule(name)) if powers else None
                        found = self._solve(before.model, now.model, name, self.moments(name), moved)
                        if old is not None:
                            self._note_fit(before.model, now.model, name, moved, old, powers[name])
                    except Exception as error:
                        failed = error
                self.processes.raise_if_any_failed(failed)
                notes += self._to_all(now.model, name, found)
            changed += known
        return changed, notes

    def _seen(
        self, before: LayerwiseRunner, now: LayerwiseRunner, step: int, leader: str, powers: dict[str, float]
    ) -> InputShift:
        """Pairs of what a group was given and is given now; over all processes, on the first one.

        To each of the `powers` the sum of what its site puts out in the original, squared, is added.
        """
        moved = InputShift.empty(self.sites[leader].in_features, now.device)
        with self.processes.failing_together(), before.at(step), now.at(step):
            for batch in now.batches:
                x, y = before.look(step, batch, leader), now.look(step, batch, leader)
                if x.shape != y.shape:
                    raise NumericalError(
                        f"{leader} reads {tuple(x.shape)} in the original and {tuple(y.shape)} in the compressed model"
                    )
                x, y = real_tokens(x, batch), real_tokens(y, batch)
                moved.update(x, y, f"input of {leader} in the compressed model")
                for name in powers:
                    output = functional.linear(x.float(), *_linear(before.model.get_submodule(name)))
                    powers[name] += float(output.square().sum())
        if self.processes.size == 1:
            return moved
        state = moved.state()
        self.processes.reduce(state, 0)
        return InputShift.from_state(state)

    def _note_fit(
        self,
        original: nn.Module,
        compressed: nn.Module,
        name: str,
        moved: InputShift,
        old: tuple[Tensor, Tensor | None],
        power: float,
    ) -> None:
        """Write down how near a site's output was with its old weight, and is."""
        assert self.fits is not None
        truth = _linear(original.get_submodule(name))
        near = [
            max(0.0, power + moved.count * moved.output_error(*truth, *linear)) / power if power else 0.0
            for linear in (old, _linear(compressed.get_submodule(name)))
        ]
        self.fits[name] = Fit(*near)

    def _to_all(self, model: nn.Module, name: str, notes: list[str]) -> list[str]:
        """Give every process what the first one has stored; returns its notes."""
        if self.processes.size == 1:
            return notes
        tensors, spec = serialize_module(model.get_submodule(name)) if self.processes.main else ({}, {})
        tensors, content = self.processes.broadcast((tensors, {"spec": spec, "notes": notes}))
        if not self.processes.main:
            deserialize_module(model, name, tensors, content["spec"])
        return list(content["notes"])

    def _solve(
        self, original: nn.Module, compressed: nn.Module, name: str, moments: Moments, moved: InputShift
    ) -> list[str]:
        """Solve one site on its moved inputs and store it; returns notes."""
        site, choice = self.sites[name], self.choices[name]
        old: Any = original.get_submodule(name)
        current: Any = compressed.get_submodule(name)
        device = moved.gram.device
        weight = dense_weight(old).to(device).float()
        target = moved.target(weight, centered=moments.centered)
        bias = old.bias.detach().to(device) if site.has_bias else None
        notes: list[str] = []
        if choice.form == DENSE:
            stored = target
        else:
            now = moments.with_statistics({**moments.own, **moved.statistics()})
            solved = factorize(self.method.metric(target, now), name)
            notes.extend(solved.notes)
            left, right = solved.truncated(choice.rank)
            stored = left @ right
        if bias is not None and moments.centered:
            mean, shifted = moved.means()
            bias = bias.double() + weight.double() @ mean - stored.double() @ shifted
        if choice.form == DENSE:
            set_dense_weight(compressed, name, stored, bias)
            return notes
        dtype = next(p.dtype for p in current.parameters())
        module, fallback = store_factors(site, choice.form, choice.rank, left, right, bias, dtype)
        replace_module(compressed, name, module)
        return [*notes, fallback] if fallback is not None else notes


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias that a module stands for, whatever form it is stored in."""
    if isinstance(module, FactoredLinear):
        weight, bias = module.to_dense().detach(), module.dense_bias()
    else:
        weight, bias = dense_weight(module), module.bias
    return weight, None if bias is None else bias.detach()


def refittable(
    groups: Mapping[str, Sequence[str]], walk: LayerwiseRunner, leave: Collection[str]
) -> tuple[dict[int, Groups], list[str]]:
    """Which groups are solved again at which step.

    Args:
        groups: leader -> members, in order of the forward pass.
        walk: through the original model.
        leave: sites whose input is not one tensor a pass.

    Returns:
        Step -> groups, and notes of what is left as it is.
    """
    order = walk.order
    steps: dict[int, Groups] = {}
    notes = [f"{name}: not refitted, it reads more than one input" for name in leave]
    outside: list[str] = []
    several: list[str] = []
    routed: list[str] = []
    for leader, members in split_by_segment(groups, order).items():
        if set(members) & set(leave):
            continue
        if leader in order.between:
            outside.append(leader)
        elif len(order.segments[leader]) > 1:
            several.append(leader)
        elif any("expert" in part for part in leader.split(".")):
            routed.append(leader)  # the compressed model sends it other tokens, so that they come in no pairs
        else:
            steps.setdefault(order.segments[leader][0], {})[leader] = members
    if several:
        notes.append(f"not refitted, called by several layers: {', '.join(several[:5])}")
    if routed:
        notes.append(f"not refitted, routed experts: {', '.join(routed[:5])}")
    if outside:
        notes.append(f"not refitted, outside the blocks: {', '.join(outside[:5])}")
    return steps, notes
