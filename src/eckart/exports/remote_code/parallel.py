"""How a factored model is split among processes: a plan of tensor parallelism for its factors, or why there is none.

A plan of transformers, which vLLM reads too, gives a style to each role: of a column-parallel layer each process has
some of the outputs, of a row-parallel one some of the inputs, and the products of all processes are added up. Of
`y = B (A x) + b` in a column-parallel place, A is whole in each process and B is column-parallel; in a row-parallel
one, A is row-parallel, so that `A x` is whole after the sum, and B is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from eckart.exports.remote_code.describe import Replacement
from eckart.exports.remote_code.roles import role_of

SPLIT = {
    ("lowrank", "colwise"): "output_factor",
    ("lowrank", "rowwise"): "input_factor",
    ("shared-basis", "colwise"): "output_factor",
    ("shared-basis", "rowwise"): "input_factor",
    ("joint", "colwise"): "output_factor",
    ("joint", "rowwise"): "input_factor",
    ("pivoted-joint", "colwise"): "output_factor",  # the inputs are put in order: all of them must be there
    ("pivoted", "rowwise"): "pivots",  # the outputs are put in order: all of them must be there
    ("whole", "colwise"): "whole",
    ("whole", "rowwise"): "whole",
}
"""(form, direction) -> the leaf that takes the style; the others are whole in each process."""

AS_IT_IS = ("linear", "conv1d")


@dataclass(frozen=True)
class Parallel:
    """A plan, and what hinders.

    Attributes:
        plan: role of a leaf -> style; None where the model cannot be split.
        reason: why it cannot be split among processes; "" where it can, or where its class has no plan either.
        crosses_layers: whether layers use parameters of others, so that they cannot be put on several machines.
        engine_reason: why vLLM, which builds parts of a model by itself, would compute something else; "" if it would
            not.
        plan_of_parts: whether parts of the base model bring plans of their own, which are for ordinary layers.
    """

    plan: dict[str, str] | None
    reason: str
    crosses_layers: bool
    engine_reason: str
    plan_of_parts: bool = False

    @property
    def refusal(self) -> str:
        """What the generated file says where the model would be computed wrongly; "" where it cannot happen."""
        if self.engine_reason:
            return f"vLLM cannot serve this model: {self.engine_reason}."
        if self.reason:
            return (
                f"This model cannot be split among processes: {self.reason}. Use one, or compress it with a form that "
                "can be split: lowrank or joint."
            )
        return "Layers of this model use parameters of others: use one process." if self.crosses_layers else ""


def plan_parallel(
    base: nn.Module,
    class_plan: Mapping[str, str] | None,
    replacements: Mapping[str, Replacement],
    *,
    heads_are_gone: bool = False,
    plan_of_parts: bool = False,
) -> Parallel:
    """The plan for a base model's replaced modules, from its class's own plan.

    Args:
        base: the base model before modules are replaced.
        class_plan: role -> style.
        replacements: name in the base model -> what stands there.
        heads_are_gone: whether attention modules have not as many heads as the configuration says.
        plan_of_parts: whether models inside the base model have plans of their own.
    """
    by_role: dict[str, list[Replacement]] = {}
    for name, one in replacements.items():
        by_role.setdefault(role_of(name), []).append(one)
    plan: dict[str, str] = {}
    reason = ""
    for role, style in (class_plan or {}).items():
        here = by_role.get(role, [])
        if not here:
            plan[role] = style
        direction = style.partition("_")[0]
        for one in here:
            leaf = SPLIT.get((one.form, direction))
            if leaf is not None:
                plan[f"{role}.{leaf}"] = style
            elif one.form not in AS_IT_IS:
                reason = reason or f"{role} is {one.form}, and its plan says {style}"
        if any(one.form in AS_IT_IS for one in here) or len(here) < _count(base, role):
            plan[role] = style
    if heads_are_gone:  # a part of so many rows may end within a head
        reason = reason or "its layers have different numbers of attention heads"
    if any(one.form == "experts" for one in replacements.values()):
        reason = reason or "experts are separate modules"
    if not class_plan and any(one.form not in AS_IT_IS for one in replacements.values()):
        # an engine may split what it finds to be ordinary layers, and that alone
        reason = "its class has no plan of tensor parallelism"
    if plan_of_parts:
        reason = reason or "models inside it have plans for ordinary layers"
    return Parallel(
        None if reason or not class_plan else plan,
        reason,
        _crosses(replacements),
        _engine_reason(replacements, heads_are_gone),
        plan_of_parts,
    )


def _count(base: nn.Module, role: str) -> int:
    return sum(role_of(name) == role for name, _ in base.named_modules())


def _crosses(replacements: Mapping[str, Replacement]) -> bool:
    """Whether a module uses another one that is not in the same layer."""

    def layer(name: str) -> str:
        parts = name.split(".")
        last = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
        return ".".join(parts[: last + 1])

    return any(layer(name) != layer(one.arguments["of"]) for name, one in replacements.items() if "of" in one.arguments)


def _engine_reason(replacements: Mapping[str, Replacement], heads_are_gone: bool) -> str:
    if heads_are_gone:
        return "its layers have different numbers of attention heads"
    forms = {one.form for one in replacements.values()}
    if "experts" in forms:
        return "its experts are separate modules"
    if "safe-embedding" in forms:
        return "an embedding that depends on other tokens needs all of them at each step"
    for one in replacements.values():
        if one.form == "same":
            other = replacements.get(one.arguments["of"])
            if other is None or other.form != "whole":
                return "layers are other layers once more"
    return ""
