"""DSEE (Chen et al. 2021, arXiv 2111.00160): tune a frozen model by a small update, and prune it on the way.

The update `dW = (alpha / r) B A + S2` has S2 on fixed positions: where the split of the pretrained weight into low-rank
+ sparse has its sparse part. Halfway W itself may be pruned, `W . S1`, and the update goes on training around the gaps.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.errors import UsageError
from eckart.linalg import low_rank_sparse_split, smallest_masked
from eckart.model import Site, dense_weight, find_sites, replace
from eckart.recover.adapter import Adapted, Adapter, adapted_modules, fold_gates, gate_input, merge
from eckart.recover.losparse import patterns
from eckart.recover.neurons import Neurons, find_neurons, magnitudes, remove_neurons
from eckart.recover.room import BaseRoom, Context

# What models call the projections of queries and values, which the paper updates; fused projections hold them too.
ADAPTED = (
    "query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "query_proj", "value_proj", "q", "v",
    "c_attn", "query_key_value", "qkv_proj", "Wqkv",
)  # fmt: skip
PRUNE = ("none", "unstructured", "structured")
SCORES = ("magnitude", "gates")


@dataclass
class Dsee(BaseRoom):
    """Tunes an update of a frozen model, which takes about half a hundredth of the numbers of BERT-base.

    Attributes:
        rank: r.
        alpha: scale of the low-rank update is alpha / r; 0: r.
        positions: of S2, in each weight.
        targets: sites that get an update, as in `find_sites`, separated by commas; "": projections of queries and
            values by their usual names, every site where a model has none of them.
        ignore: sites that get none.
        prune: "none"; "unstructured": W's numbers of smallest magnitude, one threshold over all sites;
            "structured": hidden neurons of feed-forward layers, as many in each, which are removed.
        fraction: of W's numbers, or of each layer's neurons, that goes.
        score: of neurons: "gates", trained with an l1 penalty until they are pruned, or "magnitude", the product of the
            norms of a neuron's rows and column, a proxy.
        penalty: of the gates.
        prune_at: fraction of the steps after which W is pruned.
        rounds: of the split.
        train_head: train what the model has outside its body, but for an output embedding.
        seed: of A.
    """

    name: ClassVar[str] = "dsee"
    title: ClassVar[str] = "a low-rank + sparse update of a frozen model, which may be pruned on the way"
    paper: ClassVar[str] = "Chen et al. 2021, arXiv 2111.00160"
    starts_dense: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 5e-4

    rank: int = 16
    alpha: float = 0.0
    positions: int = 64
    targets: str = ""
    ignore: str = ""
    prune: str = "none"
    fraction: float = 0.25
    score: str = "magnitude"
    penalty: float = 1e-4
    prune_at: float = 0.5
    rounds: int = 100
    train_head: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for key, known in (("prune", PRUNE), ("score", SCORES)):
            if getattr(self, key) not in known:
                raise UsageError(
                    f"recovery {self.name}: {key} {getattr(self, key)!r} is unknown; use {', '.join(known)}."
                )
        numbers = self.rank >= 1 and self.positions >= 0 and self.rounds >= 1
        if not numbers or not 0 <= self.fraction < 1 or not 0 <= self.prune_at <= 1:
            raise UsageError(
                f"recovery {self.name}: rank {self.rank} and rounds {self.rounds} must be 1 or more, "
                f"positions {self.positions} 0 or more, fraction {self.fraction:g} in 0..1 (1 excluded) "
                f"and prune_at {self.prune_at:g} in 0..1."
            )
        self.adapter: Adapter | None = None
        self._sites: tuple[Site, ...] = ()
        self._neurons: list[Neurons] = []
        self._gates: list[nn.Parameter] = []
        self._kept: dict[Neurons, Tensor] = {}
        self._pruned = False
        self._threshold = -1.0
        self._report: dict[str, Any] = {}

    @property
    def shrinks(self) -> bool:
        """Where the model is pruned."""
        return self.prune != "none"

    def prepare(self, model: PreTrainedModel, context: Context) -> None:
        """Freeze the model, and put an update around every chosen weight.

        Raises:
            ModelError: if no site is left.
            UsageError: if a pattern matches nothing.
        """
        self.context = context
        self._sites = find_sites(model).chosen
        before = _multiply_adds(model)
        if self.prune == "structured":
            self._neurons, left = find_neurons(model, self._sites, model.dummy_inputs)
            if left:
                listed = ", ".join(list(left)[:3]) + (", ..." if len(left) > 3 else "")
                self.context.notes.append(
                    f"{len(left)} linear layers left: no trial shows that their inputs are the outputs of another one, "
                    f"one to one and token by token: {listed}"
                )
            self.context.notes.append(
                "attention heads left: only a model's own code says how it cuts its width into heads"
            )
            if not self._neurons:
                self.context.notes.append("no layer of neurons was found; nothing is pruned")
        total = sum(parameter.numel() for parameter in model.parameters())
        model.requires_grad_(False)
        for site in self._updated(model):
            old = model.get_submodule(site.name)
            places = self._places(dense_weight(old), site.name)
            stream = torch.Generator().manual_seed(self.seed * 2**32 + zlib.crc32(site.name.encode()))
            alpha = self.alpha or float(self.rank)
            replace(model, site.name, Adapted(old, min(self.rank, *site.shape), alpha, places, stream))
        for layer in self._neurons:
            ones = torch.ones(layer.width, device=_frozen(model, layer.reader).device)
            gates = gate_input(model.get_submodule(layer.reader), ones.requires_grad_(self.score == "gates"))
            self._gates.append(gates)
        head = {id(parameter) for parameter in _head(model)} if self.train_head else set()
        for name, parameter in model.named_parameters():
            if id(parameter) in head or context.in_head(name):
                parameter.requires_grad_(True)
        super().prepare(model, context)
        self._report = {
            "updated": list(adapted_modules(model)),
            "model_elements": total,
            "multiply_adds_before": before,
        }

    def loss(self, outputs: Any, teacher_outputs: Any, batch: Any, task_loss: Tensor) -> Tensor:
        """The task's loss, and the l1 penalty of gates that are being trained."""
        gates = [gate for gate in self._gates if gate.requires_grad]
        if not gates:
            return task_loss
        return task_loss + self.penalty * torch.stack([gate.abs().sum() for gate in gates]).sum()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Prune W when its time has come.

        Args:
            model: in training.
            step: the step that was made, from 0.
        """
        if not self._pruned and step + 1 >= self.prune_at * self.context.total_steps:
            self._prune(model)

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """Merge the update into W, and remove what was pruned. The update alone stays as `adapter`."""
        if not self._pruned:
            self._prune(model)
        masked = [site.name for site in self._sites] if self.prune == "unstructured" else []
        self.adapter = Adapter.of(model, masked=masked, threshold=self._threshold)
        merge(model)
        fold_gates(model)
        removed = 0
        if self._kept:
            reason = remove_neurons(model, self._kept)
            if reason is None:
                removed = sum(int((~mask).sum()) for mask in self._kept.values())
            else:
                self.context.notes.append(f"pruned neurons are zero but still there: {reason}")
        model.requires_grad_(True)
        after = _multiply_adds(model)
        self._report |= {
            "removed_neurons": removed,
            "multiply_adds_after": after,
            "multiply_adds_saved": 1 - after / self._report["multiply_adds_before"],
        }
        self._gates = []
        return model

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the update alone, after `finish`; returns the folder.

        Raises:
            UsageError: before `finish`.
        """
        if self.adapter is None:
            raise UsageError("dsee: the update is taken by finish(); call that first, or save_adapter(model, folder).")
        return self.adapter.save(folder)

    def report(self) -> dict[str, Any]:
        """What trained, what was pruned and what that saves."""
        asked = {key: getattr(self, key) for key in ("rank", "positions", "prune", "fraction", "score", "prune_at")}
        return super().report() | asked | self._report

    def state(self) -> dict[str, Tensor]:
        """Whether W was pruned, at which threshold, and which neurons stay."""
        state = {f"kept/{layer.reader}": mask for layer, mask in self._kept.items()}
        threshold = torch.tensor(self._threshold, dtype=torch.float64)
        return state | {"pruned": torch.tensor(self._pruned), "threshold": threshold}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` gave."""
        self._pruned, self._threshold = bool(state["pruned"]), float(state["threshold"])
        for layer, gate in zip(self._neurons, self._gates, strict=True):
            if f"kept/{layer.reader}" in state:
                self._kept[layer] = state[f"kept/{layer.reader}"].to(gate.device, copy=True)
                gate.requires_grad_(False)

    # -- inside ----------------------------------------------------------------------------------------

    def _updated(self, model: PreTrainedModel) -> Sequence[Site]:
        sites = find_sites(model, patterns(self.targets), patterns(self.ignore)).chosen
        if self.targets:
            return sites
        usual = tuple(site for site in sites if site.name.rpartition(".")[2] in ADAPTED)
        if not usual:
            self.context.notes.append(
                "no projection of queries or values is known by its name: every site gets an update"
            )
        return usual or sites

    def _places(self, weight: Tensor, name: str) -> Tensor:
        """Where S2 may differ from zero."""
        count = min(self.positions, weight.numel())
        if weight.is_meta:  # shapes alone: sizes can be counted before there are numbers
            return torch.empty(count, dtype=torch.int64, device="meta")
        return low_rank_sparse_split(weight, min(self.rank, *weight.shape), count, self.rounds, name).positions

    def _prune(self, model: nn.Module) -> None:
        self._pruned = True
        if self.prune == "unstructured":
            self._mask(model)
        elif self.prune == "structured":
            for layer in self._neurons:
                self._close(model, layer)
            self._report["neurons"] = {layer.reader: int(mask.sum()) for layer, mask in self._kept.items()}

    def _mask(self, model: nn.Module) -> None:
        """Set the smallest numbers of W to zero, the update apart."""
        names = [site.name for site in self._sites]
        masks, self._threshold = smallest_masked([_frozen(model, name) for name in names], self.fraction)
        with torch.no_grad():
            for name, mask in zip(names, masks, strict=True):
                _frozen(model, name).mul_(mask)
        self._report |= {"zeros": sum(int((~mask).sum()) for mask in masks), "threshold": self._threshold}

    def _close(self, model: nn.Module, layer: Neurons) -> None:
        """Close the gates of the neurons that matter least; the others stay as they were trained."""
        gate = model.get_parameter(f"{layer.reader}.input_gate")
        if self.score == "gates":
            scores = gate.detach().abs()
        else:
            scores = magnitudes(_frozen(model, layer.reader), [_frozen(model, name) for name in layer.writers])
        count = int(self.fraction * layer.width)
        kept = torch.ones(layer.width, dtype=torch.bool, device=scores.device)
        kept[scores.argsort(stable=True)[:count]] = False
        gate.requires_grad_(False).mul_(kept)
        gate.grad = None
        self._kept[layer] = kept


def _frozen(model: nn.Module, name: str) -> Tensor:
    """The frozen weight at a site, (out, in), in place."""
    module: Any = model.get_submodule(name)
    return dense_weight(module.dense if isinstance(module, Adapted) else module)


def _head(model: PreTrainedModel) -> list[nn.Parameter]:
    """Parameters outside the model's body, but those of an output embedding."""
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    output = model.get_output_embeddings()
    inside |= {id(parameter) for parameter in output.parameters()} if output is not None else set()
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


def _multiply_adds(model: nn.Module) -> int:
    """Of the linear layers, per token."""
    linear = (module for module in model.modules() if isinstance(module, nn.Linear | Conv1D))
    return sum(module.weight.numel() for module in linear)
