"""LoRA on the factors, merged into them: they keep their size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from eckart.errors import UsageError
from eckart.model import factored_modules, find_sites, shared_parameters
from eckart.recovery.base import Recovery, RecoveryContext


@dataclass
class LoRA(Recovery):
    """`W + (alpha / r) B A` for each leaf W of the factors, A and B trained and W frozen.

    Hu et al. 2021, arXiv 2106.09685. A leaf is a plain Linear, so that its adapter is merged into the leaf itself: the
    low-rank product B' A' stays of rank k, and a pivoted form keeps its pivots. A leaf that several layers share gets
    none: two adapters cannot be merged into one weight.

    Attributes:
        rank: r.
        alpha: the scale is alpha / r; 0 for 2 r.
        dropout: on the adapters' input.
        dense: also adapt the dense weights that could be factored. A model without factors is adapted there anyway.
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "adapters on the factors, merged into them"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"
    use: ClassVar[str] = (
        "Memory for training is short, or few texts are there: few numbers are trained, and merging them "
        "keeps the size of the factors."
    )
    learning_rate: ClassVar[float] = 5e-4

    rank: int = 8
    alpha: int = 0
    dropout: float = 0.0
    dense: bool = False

    def __post_init__(self) -> None:
        self.check_range("[1, inf)", "rank")
        self.check_range("[0, inf)", "alpha")
        self.check_range("[0, 1)", "dropout")

    def prepare(self, model: PreTrainedModel, context: RecoveryContext) -> None:
        """Freeze everything but the head, and put the adapters in.

        Raises:
            UsageError: peft is not installed, or there is nothing to adapt.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UsageError(
                "recovery lora: it needs peft, which is not installed. Install it: pip install peft"
            ) from None
        self.targets = self._targets(model)
        ties = shared_parameters(model)
        shared = {name.rpartition(".")[0] for name in (*ties, *ties.values())} & set(self.targets)
        if shared:
            self.targets = [name for name in self.targets if name not in shared]
            context.notes.append(f"{len(shared)} leaves have no adapter: their weights are shared by several modules")
        if not self.targets:
            raise UsageError(
                f"recovery lora: {type(model).__name__} holds no factor and no dense weight of its own to adapt; use "
                "--recovery full or distil."
            )
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha or 2 * self.rank, lora_dropout=self.dropout,
            target_modules=self.targets,
        )  # fmt: skip
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or context.in_output_head(name))
        super().prepare(model, context)

    def _targets(self, model: PreTrainedModel) -> list[str]:
        factored = factored_modules(model)
        leaves = [
            f"{name}.{path}"
            for name, form in factored.items()
            for path, leaf in form.named_modules()
            if isinstance(leaf, nn.Linear)
        ]
        if leaves and not self.dense:
            return leaves
        return leaves + ([site.name for site in find_sites(model).chosen] if _has_sites(model) else [])

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """Merge each adapter into its leaf and take it off."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        with torch.no_grad():
            for name, module in adapted.items():
                module.merge(safe_merge=True)
                model.set_submodule(name, module.get_base_layer())
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        model.__dict__.pop("peft_config", None)
        return model

    def report(self) -> dict[str, Any]:
        """Rank, scale, and how many leaves were adapted."""
        alpha = self.alpha or 2 * self.rank
        return super().report() | {"rank": self.rank, "alpha": alpha, "adapted": len(self.targets)}


def _has_sites(model: PreTrainedModel) -> bool:
    return any(type(module).__name__ in ("Linear", "Conv1D") for module in model.modules())
