"""DSEE (Chen et al. 2021, arXiv 2111.00160): tune a frozen model by a small update, and prune it during training.

The update `dW = (alpha / r) B A + S2` has S2 on fixed positions: where the split of the pretrained weight into low-rank
+ sparse has its sparse part. Halfway W itself may be pruned, `W . S1`, and the training of the update continues.
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
from eckart.model import Site, dense_weight, find_sites, replace_module
from eckart.model.neurons import NeuronLayer, find_neurons, magnitudes, remove_neurons
from eckart.recovery.base import Recovery, RecoveryContext
from eckart.recovery.pruning.attention import HeadLayout
from eckart.recovery.pruning.gates import fold_gates, gate_input
from eckart.recovery.pruning.heads import find_heads, remove_heads
from eckart.recovery.pruning.heads import magnitudes as head_magnitudes
from eckart.recovery.settings import split_patterns
from eckart.recovery.training.adapter import AdaptedLinear, Adapter, adapted_modules, merge

# What models call the projections of queries and values, which the paper updates; fused projections hold them too.
ADAPTED = (
    "query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "query_proj", "value_proj", "q", "v",
    "c_attn", "query_key_value", "qkv_proj", "Wqkv",
)  # fmt: skip
PRUNE = ("none", "unstructured", "structured")
SCORES = ("magnitude", "gates")


@dataclass
class DSEE(Recovery):
    """Trains an update of a frozen model; of BERT-base it has about 0.5% of the parameters.

    Attributes:
        rank: r.
        alpha: scale of the low-rank update is alpha / r; 0: r.
        positions: of S2, in each weight.
        targets: sites that get an update, as in `find_sites`, separated by commas; "": projections of queries and
            values by their usual names, every site where a model has none of them. `targets=* rank=5` trains about as
            many numbers as these at rank 16, and was better where both were measured.
        ignore: sites that get none.
        prune: "none"; "unstructured": W's entries of smallest magnitude, one threshold over all sites;
            "structured": attention heads and hidden neurons of feed-forward layers, as many in each layer, which are
            removed.
        fraction: of W's entries, or of each layer's neurons, that is pruned.
        heads: fraction of each layer's attention heads that is pruned; heads that read the same keys and values are
            pruned together.
        score: of heads and neurons: "gates", trained with an l1 penalty until they are pruned, or "magnitude", the
            product of the norms of their rows and columns, a proxy.
        penalty: of the gates.
        prune_at: fraction of the steps after which W is pruned.
        rounds: of the split.
        train_head: train what the model has outside its body, but for an output embedding.
        seed: of A.
    """

    name: ClassVar[str] = "dsee"
    title: ClassVar[str] = "a low-rank + sparse update of a frozen model, which may be pruned during training"
    paper: ClassVar[str] = "Chen et al. 2021, arXiv 2111.00160"
    use: ClassVar[str] = (
        "Many tasks share one model: less than one percent of the numbers is trained for each. With "
        "prune=structured heads and neurons go as well."
    )
    needs_dense_model: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 5e-4

    rank: int = 16
    alpha: float = 0.0
    positions: int = 64
    targets: str = ""
    ignore: str = ""
    prune: str = "none"
    fraction: float = 0.25
    heads: float = 0.25
    score: str = "magnitude"
    penalty: float = 1e-4
    prune_at: float = 0.5
    rounds: int = 100
    train_head: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_choice(PRUNE, "prune")
        self.check_choice(SCORES, "score")
        self.check_range("[1, inf)", "rank", "rounds")
        self.check_range("[0, inf)", "alpha", "positions", "penalty")
        self.check_range("[0, 1)", "fraction", "heads")
        self.check_range("[0, 1]", "prune_at")
        self.adapter: Adapter | None = None
        self._sites: tuple[Site, ...] = ()
        self._layers: list[NeuronLayer | HeadLayout] = []
        self._heads_config: Mapping[str, int] = {}
        self._gates: list[nn.Parameter] = []
        self._kept: dict[NeuronLayer | HeadLayout, Tensor] = {}
        self._pruned = False
        self._threshold = -1.0
        self._report: dict[str, Any] = {}

    @property
    def shrinks(self) -> bool:
        """Where the model is pruned."""
        return self.prune != "none"

    def prepare(self, model: PreTrainedModel, context: RecoveryContext) -> None:
        """Freeze the model, and put an update around every chosen weight.

        Raises:
            ModelError: if no site is left.
            UsageError: if a pattern matches nothing.
        """
        self.context = context
        self._sites = find_sites(model).chosen
        before = _multiply_adds(model)
        if self.prune == "structured":
            self._find(model)
        total = sum(parameter.numel() for parameter in model.parameters())
        model.requires_grad_(False)
        for site in self._updated(model):
            old = model.get_submodule(site.name)
            places = self._places(dense_weight(old), site.name)
            stream = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {site.name}".encode()))  # 32 bits count
            alpha = self.alpha or float(self.rank)
            replace_module(model, site.name, AdaptedLinear(old, min(self.rank, *site.shape), alpha, places, stream))
        for layer in self._layers:
            ones = torch.ones(layer.count, device=_frozen(model, layer.reader).device)
            gates = gate_input(model.get_submodule(layer.reader), ones.requires_grad_(self.score == "gates"))
            self._gates.append(gates)
        head = {id(parameter) for parameter in _head(model)} if self.train_head else set()
        for name, parameter in model.named_parameters():
            if id(parameter) in head or context.in_output_head(name):
                parameter.requires_grad_(True)
        super().prepare(model, context)
        self._report = {
            "updated": list(adapted_modules(model)),
            "model_elements": total,
            "multiply_adds_before": before,
        }

    def loss(self, outputs: Any, teacher_outputs: Any, batch: Any, task_loss: Tensor) -> Tensor:
        """The task's loss, and the l1 penalty of gates that are being trained."""
        if not self._gates or self._pruned or self.score != "gates":
            return task_loss
        return task_loss + self.penalty * torch.stack([gate.abs().sum() for gate in self._gates]).sum()

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Gates do not change any more once W is pruned; the optimizer keeps them, as before."""
        if self._pruned:
            for gate in self._gates:
                gate.grad = None

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
        if masked:
            zeros = sum(int((_frozen(model, name) == 0).sum()) for name in masked)
            self._report |= {"zeros": zeros, "threshold": self._threshold}
        self.adapter = Adapter.of(model, masked=masked, threshold=self._threshold)
        merge(model)
        fold_gates(model)
        removed = self._remove(model)
        model.requires_grad_(True)
        after = _multiply_adds(model)
        self._report |= removed | {
            "elements_after": sum(parameter.numel() for parameter in model.parameters()),
            "multiply_adds_after": after,
            "multiply_adds_saved": 1 - after / self._report["multiply_adds_before"],
        }
        if self._kept:
            self.context.notes.append(
                f"removed {removed['removed_heads']} attention heads and {removed['removed_neurons']} neurons, "
                f"{self._report['multiply_adds_saved']:.1%} of the multiply-adds of linear layers"
            )
        self._gates = []
        return model

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the update alone, after `finish`; returns the folder.

        Raises:
            UsageError: before `finish`.
        """
        if self.adapter is None:
            raise UsageError(
                "dsee: the update is kept by finish(). Call that first, or use save_adapter(model, folder)."
            )
        return self.adapter.save(folder)

    def report(self) -> dict[str, Any]:
        """What trained, what was pruned and what that saves."""
        asked = {key: getattr(self, key) for key in ("rank", "positions", "prune", "fraction", "score", "prune_at")}
        return super().report() | asked | {"asked_heads": self.heads} | self._report

    def state(self) -> dict[str, Tensor]:
        """Whether W was pruned, at which threshold, and which heads and neurons stay."""
        state = {f"kept/{layer.reader}": mask for layer, mask in self._kept.items()}
        threshold = torch.tensor(self._threshold, dtype=torch.float64)
        return state | {"pruned": torch.tensor(self._pruned), "threshold": threshold}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` gave."""
        self._pruned, self._threshold = bool(state["pruned"]), float(state["threshold"])
        for layer, gate in zip(self._layers, self._gates, strict=True):
            if f"kept/{layer.reader}" in state:
                self._kept[layer] = state[f"kept/{layer.reader}"].to(gate.device, copy=True)

    # -- inside ----------------------------------------------------------------------------------------

    def _find(self, model: PreTrainedModel) -> None:
        """Layers of neurons and attention heads that can be removed, and notes of those that cannot."""
        notes = self.context.notes
        neurons, left = find_neurons(model, self._sites, model.dummy_inputs)
        self._layers = [*neurons]
        if self.heads:
            taken = {layer.reader for layer in neurons}
            found = find_heads(model, self._sites, model.dummy_inputs, self.heads, taken)
            self._layers += found.heads
            self._heads_config = found.config
            if not found.heads and not found.left:
                notes.append("no attention heads were found")
            for reason in dict.fromkeys(found.left.values()):
                names = [name for name, why in found.left.items() if why == reason]
                notes.append(f"heads of {len(names)} attentions are not pruned, {reason}: {_listed(names)}")
            left = {name: why for name, why in left.items() if name not in {layer.reader for layer in found.heads}}
        if left:
            notes.append(
                f"{len(left)} linear layers not pruned: no probe shows that their inputs are another one's outputs, "
                f"one to one and token by token: {_listed(list(left))}"
            )
        if not neurons:
            notes.append("no layer of neurons was found; none is pruned")

    def _remove(self, model: PreTrainedModel) -> dict[str, Any]:
        """Take out what was pruned; how many neurons and heads went, and how many each layer has left."""
        neurons = {layer: mask for layer, mask in self._kept.items() if isinstance(layer, NeuronLayer)}
        heads = {layer: mask for layer, mask in self._kept.items() if isinstance(layer, HeadLayout)}
        reason = remove_neurons(model, neurons) if neurons else None
        if reason is not None:
            self.context.notes.append(f"pruned neurons are zero but still there: {reason}")
        remove_heads(model, heads, self._heads_config)
        gone = sum(int((~mask).sum()) for mask in neurons.values()) if reason is None else 0
        return {
            "removed_neurons": gone,
            "removed_heads": sum(int((~mask).sum()) * layer.each for layer, mask in heads.items()),
            "neurons": {layer.reader: int(mask.sum()) for layer, mask in neurons.items()},
            "heads": {layer.reader: int(mask.sum()) * layer.each for layer, mask in heads.items()},
        }

    def _updated(self, model: PreTrainedModel) -> Sequence[Site]:
        sites = find_sites(model, split_patterns(self.targets), split_patterns(self.ignore)).chosen
        if self.targets:
            return sites
        usual = tuple(site for site in sites if site.name.rpartition(".")[2] in ADAPTED)
        if not usual:
            self.context.notes.append(
                "no projection of queries or values has one of the usual names: every site gets an update"
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
            for layer in self._layers:
                self._close(model, layer)

    def _mask(self, model: nn.Module) -> None:
        """Set the smallest numbers of W to zero, the update apart."""
        names = [site.name for site in self._sites]
        masks, self._threshold = smallest_masked([_frozen(model, name) for name in names], self.fraction)
        with torch.no_grad():
            for name, mask in zip(names, masks, strict=True):
                _frozen(model, name).mul_(mask)

    def _close(self, model: nn.Module, layer: NeuronLayer | HeadLayout) -> None:
        """Close the gates of what matters least; the others stay as they were trained."""
        gate = model.get_parameter(f"{layer.reader}.input_gate")
        if self.score == "gates":
            scores = gate.detach().abs()
        elif isinstance(layer, HeadLayout):
            scores = head_magnitudes(model, layer, _frozen)
        else:
            writers = [layer.neuron_rows(name, _frozen(model, name)) for name in layer.writers]
            scores = magnitudes(_frozen(model, layer.reader), writers)
        count = int((self.heads if isinstance(layer, HeadLayout) else self.fraction) * layer.count)
        kept = torch.ones(layer.count, dtype=torch.bool, device=scores.device)
        kept[scores.argsort(stable=True)[:count]] = False
        with torch.no_grad():
            gate.mul_(kept)
        self._kept[layer] = kept


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _frozen(model: nn.Module, name: str) -> Tensor:
    """The frozen weight at a site, (out, in), in place."""
    module: Any = model.get_submodule(name)
    return dense_weight(module.dense if isinstance(module, AdaptedLinear) else module)


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
