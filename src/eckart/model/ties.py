"""Which parameters of a model are one: as transformers keeps it, for dense modules and for factored ones.

transformers ties parameters by name, in `_tied_weights_keys` of every model in the tree (what it re-reads) and in
`all_tied_weights_keys` (what it has read): target -> source. Where an embedding and what is tied to it are factored,
the tie of their weights becomes one for each number that they have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from eckart.forms import Factored
from eckart.forms.transformers_internals import own_ties, set_own_ties

Keys = dict[str, str]
OWN = "bias"
"""A tied head's own number: under the name that it had, tied as it was."""


def declared_ties(model: nn.Module) -> dict[str, Keys]:
    """What each model in the tree ties, by its name in the tree; names inside are its own.

    To be asked before modules are replaced: patterns are matched against the parameters that are there.
    """
    return {
        name: dict(part.get_expanded_tied_weights_keys(all_submodels=False))
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel)
    }


def tie_factored(model: nn.Module, before: Mapping[str, Keys], *, tie: bool = True) -> None:
    """Rewrite the ties whose both ends are factored now, and tie.

    Args:
        model: with forms in place.
        before: as :func:`declared_ties` gave it, before they were.
        tie: make them one parameter; not on a model that is still to be loaded, whose loader does so.
    """

    def forth(_: str, part: nn.Module, keys: Mapping[str, str]) -> Keys:
        found: Keys = {}
        for target, source in keys.items():
            mine, theirs = _module(part, target), _module(part, source)
            if isinstance(mine, Factored) and isinstance(theirs, Factored) and target.endswith(".weight"):
                own = dict(mine.named_parameters())
                stems = target.removesuffix("weight"), source.removesuffix("weight")
                found |= {stems[0] + n: stems[1] + n for n, _ in theirs.named_parameters() if n in own and n != OWN}
            else:
                found[target] = source
        return found

    _rewrite(model, before, forth, tie)


def tie_dense(model: nn.Module, factored: Collection[str]) -> None:
    """The way back: ties of the numbers of forms that are dense modules now become ties of their weights.

    Args:
        model: with dense modules in place.
        factored: names of those that were forms.
    """
    before = {
        name: dict(ties)
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel) and (ties := own_ties(part)) is not None  # rewritten, for this model alone
    }

    def back(name: str, _: nn.Module, keys: Mapping[str, str]) -> Keys:
        stem = f"{name}." if name else ""
        own = [n.removeprefix(stem) for n in factored if n.startswith(stem)]
        found: Keys = {}
        for target, source in keys.items():
            mine, theirs = _owner(target, own), _owner(source, own)
            if mine is not None and theirs is not None and target != f"{mine}.{OWN}":
                found[f"{mine}.weight"] = f"{theirs}.weight"
            else:
                found[target] = source
        return found

    _rewrite(model, before, back, True)


def _rewrite(
    model: nn.Module,
    before: Mapping[str, Keys],
    change: Callable[[str, nn.Module, Mapping[str, str]], Keys],
    tie: bool,
) -> None:
    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        keys = before.get(name, {})
        if (after := change(name, part, keys)) != keys:
            set_own_ties(part, after)
        # What the loader found untied, whatever the config says, is not in here and stays out.
        part.all_tied_weights_keys = change(name, part, part.all_tied_weights_keys)
    if tie and isinstance(model, PreTrainedModel):
        model.tie_weights(recompute_mapping=False)


def _module(part: nn.Module, parameter: str) -> nn.Module | None:
    try:
        return part.get_submodule(parameter.rpartition(".")[0])
    except AttributeError:
        return None


def _owner(parameter: str, names: Iterable[str]) -> str | None:
    return next((name for name in names if parameter.startswith(f"{name}.")), None)
