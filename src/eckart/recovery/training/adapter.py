"""A small update of a frozen model: `dW = (alpha / r) B A + S2` at each chosen site, S2 on fixed positions.

The update of DSEE (Chen et al. 2021, arXiv 2111.00160): it trains in place, is saved alone, and merges into W.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.errors import CheckpointError, UsageError
from eckart.forms.lazy import LazyWeight
from eckart.model import dense_weight, replace_module, set_dense_weight
from eckart.recovery.pruning.gates import gate_input

FORMAT_VERSION = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"
HEAD = "head."
"""What the names of the output head's parameters begin with in the file."""


class AdaptedLinear(nn.Module):
    """`y = (W + (alpha / r) B A + S2) x + b` around a frozen Linear or Conv1D.

    Args:
        dense: the frozen module.
        rank: r.
        alpha: scale of the low-rank update.
        positions: (count,) int64, where S2 may differ from zero, as `row * n + column`; they stay.
        stream: draws A; B and S2 start at zero, so that nothing changes before the first step.
    """

    positions: Tensor

    def __init__(
        self, dense: Any, rank: int, alpha: float, positions: Tensor, stream: torch.Generator | None = None
    ) -> None:
        super().__init__()
        weight = dense_weight(dense)
        self.out_features, self.in_features = weight.shape
        self.rank, self.alpha = rank, alpha
        self.dense = dense.requires_grad_(False)
        down = torch.zeros(rank, self.in_features, dtype=torch.float32)
        down.normal_(0, self.in_features**-0.5, generator=stream)
        self.down = nn.Parameter(down.to(weight))  # A
        self.up = nn.Parameter(weight.new_zeros(self.out_features, rank))  # B
        self.values = nn.Parameter(weight.new_zeros(len(positions)))
        self.register_buffer("positions", positions.to(weight.device))

    @property
    def weight(self) -> Tensor:
        """The merged weight in the orientation of the frozen module, computed when its values are read."""
        flip = isinstance(self.dense, Conv1D)

        def merged() -> Tensor:
            weight = dense_weight(self.dense) + self.update().to(self.down.dtype)
            return weight.mT if flip else weight

        return LazyWeight.of(merged, tuple(self.dense.weight.shape), self.down)

    @property
    def bias(self) -> Tensor | None:
        """b."""
        return self.dense.bias

    def update(self) -> Tensor:
        """The update dW, (m, n), in float32 at least."""
        dtype = torch.promote_types(self.down.dtype, torch.float32)
        low_rank = self.up.to(dtype) @ self.down.to(dtype) * (self.alpha / self.rank)
        flat = low_rank.flatten().scatter_add(0, self.positions, self.values.to(dtype))
        return flat.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., n), giving (..., m)."""
        linear = nn.functional.linear
        y = self.dense(x)
        y = y + linear(linear(x, self.down), self.up) * (self.alpha / self.rank)
        rows, columns = self.positions // self.in_features, self.positions % self.in_features
        added = (x[..., columns] * self.values).to(y.dtype)  # (..., count)
        return y.scatter_add(-1, rows.expand_as(added), added)


def adapted_modules(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Name -> module of everything that has an update."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def merge(model: nn.Module) -> None:
    """Add every update to its weight, in place: ordinary modules are left."""
    for name, module in adapted_modules(model).items():
        weight = (dense_weight(module.dense).to(torch.float32) + module.update()).detach()
        gate = getattr(module, "input_gate", None)
        replace_module(model, name, module.dense)
        set_dense_weight(model, name, weight.to(module.down.dtype), None)
        if gate is not None:
            gate_input(model.get_submodule(name), gate)


@dataclass(frozen=True)
class Adapter:
    """What tuning added to a model, without the model.

    Attributes:
        tensors: `SITE.down`, `.up`, `.values`, `.positions`; `SITE.input_gate`; `head.PARAMETER`.
        description: alpha; `masked`: sites whose frozen weight lost its entries up to `threshold` in magnitude.
    """

    tensors: dict[str, Tensor]
    description: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, *, masked: Iterable[str] = (), threshold: float = -1.0) -> Adapter:
        """The updates, gates and trained head of a model that is being tuned.

        Raises:
            UsageError: if the model has no update.
        """
        found = adapted_modules(model)
        if not found:
            raise UsageError(f"{type(model).__name__} has no update to save: take it before it is merged.")
        tensors = {}
        for name, module in found.items():
            for key in ("down", "up", "values", "positions"):
                tensors[f"{name}.{key}"] = getattr(module, key)
        inside = {f"{name}.{key}" for name in found for key in ("down", "up", "values")}
        for name, parameter in model.named_parameters():
            if name.endswith(".input_gate"):
                tensors[name] = parameter
            elif parameter.requires_grad and name not in inside:
                tensors[HEAD + name] = parameter
        alphas = {module.alpha for module in found.values()}
        description = {"format_version": FORMAT_VERSION, "alpha": alphas.pop(), "sites": list(found)}
        kept = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        return cls(kept, description | {"masked": list(masked), "threshold": threshold})

    def save(self, folder: str | Path) -> Path:
        """Write it to a folder, which may be new; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, folder / TENSORS)
        (folder / DESCRIPTION).write_text(json.dumps(self.description, indent=2) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """Read it back.

        Raises:
            CheckpointError: if it is not there, or of a newer format.
        """
        folder = Path(folder)
        try:
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSORS)
            version = description["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} holds no adapter that can be read: {error}. Save it again.") from error
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder / DESCRIPTION} is of format {version!r}, this eckart reads {FORMAT_VERSION}. Install a newer "
                "one: pip install -U eckart"
            )
        return cls(tensors, description)

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put the updates around the weights of the pretrained model, which is frozen, in place.

        Raises:
            CheckpointError: if the model has not the modules or shapes that the update is for.
        """
        model.requires_grad_(False)
        try:
            for name in self.description["masked"]:
                weight = dense_weight(model.get_submodule(name))
                set_dense_weight(model, name, weight * (weight.abs() > self.description["threshold"]), None)
            for name in self.description["sites"]:
                self._wrap(model, name)
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for key, tensor in self.tensors.items():
                    if key.startswith(HEAD):
                        parameters[key.removeprefix(HEAD)].copy_(tensor).requires_grad_(True)
                    elif key.endswith(".input_gate"):
                        gate_input(model.get_submodule(key.removesuffix(".input_gate")), tensor)
        except (AttributeError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"the adapter does not fit {type(model).__name__}: {error}. Attach it to the pretrained model that it "
                "was tuned from."
            ) from error
        return model

    def _wrap(self, model: nn.Module, name: str) -> None:
        own: Mapping[str, Tensor] = {key: self.tensors[f"{name}.{key}"] for key in ("down", "up", "values")}
        positions = self.tensors[f"{name}.positions"]
        old = model.get_submodule(name)
        module = AdaptedLinear(old, len(own["down"]), self.description["alpha"], positions)
        if own["down"].shape != module.down.shape or own["up"].shape != module.up.shape:
            raise RuntimeError(f"{name} has another shape")
        with torch.no_grad():
            for key, tensor in own.items():
                getattr(module, key).copy_(tensor)
        replace_module(model, name, module)


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the updates of a model that is being tuned; returns the folder."""
    return Adapter.of(model).save(folder)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Attach what was saved to the pretrained model, in place."""
    return Adapter.load(folder).attach(model)
