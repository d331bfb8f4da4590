"""How the sites of a model are called: which share an input, and which read what all examples of a batch share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from eckart.calibration.layerwise import Groups
from eckart.data import Batch
from eckart.data.inference import forward
from eckart.moments import common_calls, shared_inputs


def group_by_input(
    model: PreTrainedModel, names: Sequence[str], example: Batch, boundaries: Sequence[str] = ()
) -> Groups:
    """Sites that share an input, found by running one example; those that it does not reach are alone.

    Args:
        model: the model.
        names: sites.
        example: a batch of one row.
        boundaries: blocks; sites of two of them are never grouped.
    """
    groups: Groups = shared_inputs(model, names, lambda: forward(model, example.inputs), boundaries)
    called = {name for members in groups.values() for name in members}
    return groups | {name: (name,) for name in names if name not in called}  # another text may reach it: an expert


def calls_on_common_inputs(model: PreTrainedModel, names: Sequence[str], example: Batch) -> dict[str, frozenset[int]]:
    """Site -> its calls on what the examples of a batch have in common, such as a table of relative positions."""
    twice = {
        key: torch.cat([value, value]) if value.dim() and len(value) == len(example) else value
        for key, value in example.inputs.items()
    }
    return common_calls(model, names, lambda: forward(model, example.inputs), lambda: forward(model, twice))
