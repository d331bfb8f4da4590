"""Numbers of a configuration that say how wide layers are, found by trial."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import product

import torch
from transformers import PreTrainedModel


def find_config_sizes(model: PreTrainedModel, widths: Mapping[int, int]) -> dict[str, int] | None:
    """Entries of the configuration with which the model's class builds just the shapes that the model has.

    For each width the keys of that value are tried one by one, then those without a value (whose default would be that
    width), then all of that value together: an encoder's and a decoder's.

    Args:
        model: some layers of which are narrower than its configuration says; it is not changed.
        widths: width of these layers before -> now.

    Returns:
        Key -> value; None if there are no such keys.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for several in product(*(list(_choices(model, before, after)) for before, after in widths.items())):
        changes = {key: value for one in several for key, value in one.items()}
        config = copy.deepcopy(model.config)
        for key, value in changes.items():
            setattr(config, key, value)
        try:
            with torch.device("meta"):
                trial = type(model)(config)
        except Exception:  # a number that this class cannot be built with is not the one
            continue
        if {name: tensor.shape for name, tensor in trial.state_dict().items()} == shapes:
            return changes
    return None


def _choices(model: PreTrainedModel, before: int, after: int) -> Iterator[dict[str, int]]:
    content = vars(model.config)
    same = [key for key, value in content.items() if type(value) is int and value == before]
    open_ = [key for key, value in content.items() if value is None and not key.startswith("_")]
    for keys in [*([key] for key in (*same, *open_)), same]:
        yield dict.fromkeys(keys, after)
