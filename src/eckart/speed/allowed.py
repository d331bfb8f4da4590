"""How fast a model can be at best: as much as fewer multiply-adds in its linear layers allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from eckart.forms import FactoredLinear
from eckart.forms.quantized import QuantizedLinear


@dataclass(frozen=True)
class Allowed:
    """What Amdahl's law says of a model whose linear layers compute less than those of the original.

        allowed = t / (t - t_linear (1 - kept))

    Attributes:
        share: t_linear / t, the part of the original's time in the layers that were made smaller.
        kept: multiply-adds of those layers in the smaller model, as a fraction of the original's.
        layers: how many there are.
    """

    share: float
    kept: float
    layers: int

    @property
    def speedup(self) -> float:
        """`allowed`."""
        return 1 / (1 - self.share * (1 - self.kept))

    def as_dict(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return {
            "share_of_linear": self.share,
            "kept_multiply_adds": self.kept,
            "layers": self.layers,
            "allowed": self.speedup,
        }


def find_allowed(original: nn.Module, smaller: nn.Module, seconds: Mapping[str, float]) -> Allowed | None:
    """What a smaller model is allowed; None where none of its layers has a counterpart that computes more.

    Args:
        original: dense.
        smaller: made from it: factored, or with fewer rows and columns.
        seconds: of the original's modules, as :func:`eckart.speed.module_times.time_modules` gives them.
    """
    changed = {}
    parts = dict(smaller.named_modules())
    for name, module in original.named_modules():
        before, after = _multiply_adds(module), _multiply_adds(parts.get(name))
        if name in seconds and before and after and after != before:
            changed[name] = (before, after)
    total = sum(seconds.values())
    if not changed or not total:
        return None
    before, after = (sum(pair[side] for pair in changed.values()) for side in (0, 1))
    after -= _computed_once(parts[name] for name in changed)
    return Allowed(sum(seconds[name] for name in changed) / total, after / before, len(changed))


def _computed_once(modules: Iterable[nn.Module]) -> int:
    """Multiply-adds that modules count as theirs, and that another of them, which reads the same input, has done."""
    seen: set[int] = set()
    again = 0
    for module in modules:
        if isinstance(module, FactoredLinear) and module.shared_by == "input":
            held = id(module.held_parameter())
            again += module.shared_elements(module.in_features, module.rank) if held in seen else 0
            seen.add(held)
    return again


def _multiply_adds(module: nn.Module | None) -> int:
    """Per token, of a linear layer; 0 of everything else."""
    if isinstance(module, FactoredLinear | QuantizedLinear):
        return module.multiply_adds()
    if isinstance(module, nn.Linear | Conv1D):
        return module.weight.numel()
    return 0
