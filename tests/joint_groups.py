"""Models whose weights of one input are joint groups, for tests of the form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from architectures import BY_NAME, Inputs
from torch import Tensor, nn

from eckart.forms import FORMS, Joint
from eckart.linalg import Problem, factorize_jointly
from eckart.model import dense_weight, find_sites, replace_module, share_parameters, store_factors
from eckart.moments import shared_inputs


def joined(
    name: str, share: float = 0.5, form: str = "lowrank", group_form: str = "joint", **options: object
) -> tuple[nn.Module, list[Sequence[str]], Inputs]:
    """A model of the zoo with all its groups joint and other weights in another form; the groups; a batch."""
    architecture = BY_NAME[name]
    model, batch = architecture.model(**options), architecture.batches(count=1)[0]
    sites = {site.name: site for site in find_sites(model).chosen}

    def run() -> None:
        with torch.no_grad():
            model(**batch)

    groups = shared_inputs(model, list(sites), run)
    joint = []
    for members in groups.values():
        weights = [dense_weight(model.get_submodule(member)) for member in members]
        rank = max(1, int(share * min(weights[0].shape[1], sum(len(weight) for weight in weights))))
        solved = factorize_jointly([Problem(weight) for weight in weights])
        kind = group_form if len(members) > 1 else form
        for member, found in zip(members, solved, strict=True):
            bias = model.get_submodule(member).bias
            own = min(rank, *sites[member].shape) if kind != group_form else rank
            module, note = store_factors(
                sites[member], kind, own, *found.truncated(own), None if bias is None else bias.detach(), torch.float32
            )
            assert note is None
            replace_module(model, member, module)
        if kind == group_form:
            first, *others = members
            share_parameters(model, {f"{other}.first.weight": f"{first}.first.weight" for other in others})
            joint.append(members)
    return model.eval(), joint, batch


def pair(readers: int = 2, width: int = 12, rank: int = 5, bias: bool = True, form: str = "joint") -> nn.ModuleList:
    """Modules of a form that share their input factor."""
    torch.manual_seed(0)
    model = nn.ModuleList([FORMS[form](width, 6 + i, rank, bias) for i in range(readers)])
    if form == "pivoted-joint":
        order = torch.randperm(width, dtype=torch.int32)
        for member in model:
            member.order.copy_(order)
    share_parameters(model, {f"{i}.first.weight": "0.first.weight" for i in range(1, readers)})
    return model.eval()


def separately(model: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """What the modules put out, each from a product of its own."""
    return [member.second(product_of(member)(x)) for member in model]


def product_of(member: nn.Module) -> Callable[[Tensor], Tensor]:
    """What makes the product of a module with its input, always anew."""
    return member.first if isinstance(member, Joint) else member._hidden
