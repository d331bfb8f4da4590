"""Tied parameters, as transformers records them, of dense and of factored modules.

transformers ties parameters by name, target -> source: in `_tied_weights_keys` of every model in the tree (which it
reads again) and in `all_tied_weights_keys` (which it has read). If an embedding and the modules tied to it are
factored, the tie of their weights becomes one tie for each parameter that they have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from eckart.forms import Factored
from eckart.forms.transformers_internals import own_ties, set_own_ties

Keys = dict[str, str]
UNTOUCHED = "bias"
"""Parameter of a tied output head that keeps its name and its tie."""


def declared_ties(model: nn.Module) -> dict[str, Keys]:
    """Name of each model in the tree -> the ties that it declares, in names relative to it.

    Call it before modules are replaced: patterns are matched against the parameters that exist.
    """
    return {
        name: dict(part.get_expanded_tied_weights_keys(all_submodels=False))
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel)
    }


def tie_factored(model: nn.Module, before: Mapping[str, Keys], *, tie: bool = True) -> None:
    """Rewrite the ties of which both ends are factored, and tie their parameters.

    Args:
        model: with factored modules.
        before: :func:`declared_ties` of the model before they were put in place.
        tie: tie the parameters; False for a model that is not loaded yet, because its loader ties them.
    """

    def to_factored(_: str, part: nn.Module, keys: Mapping[str, str]) -> Keys:
        found: Keys = {}
        for target, source in keys.items():
            mine, theirs = _module(part, target), _module(part, source)
            if isinstance(mine, Factored) and isinstance(theirs, Factored) and target.endswith(".weight"):
                own = dict(mine.named_parameters())
                stems = target.removesuffix("weight"), source.removesuffix("weight")
                found |= {
                    stems[0] + n: stems[1] + n for n, _ in theirs.named_parameters() if n in own and n != UNTOUCHED
                }
            else:
                found[target] = source
        return found

    _rewrite(model, before, to_factored, tie)


def tie_dense(model: nn.Module, factored: Collection[str]) -> None:
    """The inverse of :func:`tie_factored`: ties between factors become ties between weights.

    Args:
        model: with dense modules in place.
        factored: names of the modules that were factored.
    """
    before = {
        name: dict(ties)
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel) and (ties := own_ties(part)) is not None  # set by tie_factored
    }

    def to_dense(name: str, _: nn.Module, keys: Mapping[str, str]) -> Keys:
        stem = f"{name}." if name else ""
        own = [n.removeprefix(stem) for n in factored if n.startswith(stem)]
        found: Keys = {}
        for target, source in keys.items():
            mine, theirs = _owner(target, own), _owner(source, own)
            if mine is not None and theirs is not None and target != f"{mine}.{UNTOUCHED}":
                found[f"{mine}.weight"] = f"{theirs}.weight"
            else:
                found[target] = source
        return found

    _rewrite(model, before, to_dense, True)


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
        # Weights that the loader found untied, against the config, are not in here and stay untied.
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
