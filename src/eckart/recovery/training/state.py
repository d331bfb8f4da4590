"""The state of a training in the journal: tensors and JSON, nothing pickled, exact to the bit."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from eckart.recovery.base import Recovery
from eckart.storage.journal import Journal

STAGE = "state"


def save_state(
    journal: Journal, model: nn.Module, recovery: Recovery, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    """Write what the next step depends on, after as many steps as there are losses."""
    tensors = {f"model/{name}": value for name, value in _tensors(model).items()}
    tensors |= {f"recovery/{name}": value for name, value in recovery.state().items()}
    for number, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{key}": torch.as_tensor(value) for key, value in entry.items()}
    tensors["random/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    kind, keys, *rest = np.random.get_state()
    content = {"losses": losses, "python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
    plain = json.loads(json.dumps(content))  # tuples as lists
    journal.write(STAGE, f"step {len(losses)}", tensors, plain, supersedes=True)


def load_state(journal: Journal, model: nn.Module, recovery: Recovery, optimizer: torch.optim.Optimizer) -> list[float]:
    """Take over the last state that the journal holds; returns the losses of the steps before it.

    Args:
        journal: may be empty.
        model: prepared by the recovery, on its device.
        recovery: the one that was saved.
        optimizer: over the same parameters.
    """
    names = journal.entries(STAGE)
    if not names:
        return []
    tensors, content = journal.read(STAGE, names[-1])
    with torch.no_grad():
        for name, value in _tensors(model).items():
            value.copy_(tensors[f"model/{name}"])
    recovery.restore(_under(tensors, "recovery/"))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, "optimizer/").items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    version, numbers, gauss = content["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = content["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["random/torch"].clone())
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"].clone())
    return list(content["losses"])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, tied ones once."""
    return {**{name: p.detach() for name, p in model.named_parameters()}, **dict(model.named_buffers())}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
