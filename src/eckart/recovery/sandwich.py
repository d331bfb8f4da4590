"""Sandwich sharing of the Subformer (Reid et al. 2021, arXiv 2101.00234): all blocks but first and last are one.

The paper trains such a model from the start. Here a pretrained one is cut down to it: the central blocks of each list
share one set of weights, which starts from theirs and learns from the teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from eckart.calibration.layerwise import all_blocks
from eckart.errors import UsageError
from eckart.forms import FORMS, Factored, FactoredLinear
from eckart.linalg import Problem
from eckart.model import factored_modules, parameter_owner, share_parameters
from eckart.recovery.base import RecoveryContext
from eckart.recovery.distil import Distil

MIN_BLOCKS = 4
"""Blocks of which two are central; of three nothing would be shared."""

STARTS = ("mean", "middle")


@dataclass
class Sandwich(Distil):
    """The central blocks share their weights and learn by distillation; see :class:`Distil` for its terms.

    `--recovery-option task=1 --recovery-option logits=0 --recovery-option hidden=0` trains on the task alone.

    Attributes:
        start: what the shared weights are at first: "mean", the mean of all central blocks' (of factors: of the weights
            that they stand for, factored again); or "middle", those of the block in the middle. On the bundled model
            the mean is better by far, before training and after.
    """

    name: ClassVar[str] = "sandwich"
    title: ClassVar[str] = "the central blocks share one set of weights, which learns from the teacher"
    paper: ClassVar[str] = "Reid et al. 2021, Subformer, arXiv 2101.00234"
    use: ClassVar[str] = "Stored numbers count, and you can train for long: all central blocks have one set of weights."

    start: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice(STARTS, "start")

    @property
    def shrinks(self) -> bool:
        """Always."""
        return True

    def prepare(self, model: PreTrainedModel, context: RecoveryContext) -> None:
        """Let the central blocks share their weights.

        Raises:
            UsageError: the largest list of blocks has fewer than four, or central blocks that differ; or the two models
                cannot be compared.
        """
        before = sum(parameter.numel() for parameter in model.parameters())
        self._shared: dict[str, list[str]] = {}
        for blocks in _block_lists(model):
            reason = _refusal(model, blocks)
            parent = blocks[0].rpartition(".")[0]
            if reason is None:
                central = blocks[1:-1]
                _start_shared_block(model, central, self.start)
                names = [name for name, _ in model.get_submodule(central[0]).named_parameters()]
                share_parameters(model, {f"{other}.{n}": f"{central[0]}.{n}" for other in central[1:] for n in names})
                self._shared[parent] = central
            elif not self._shared:  # the largest list comes first
                raise UsageError(f"recovery {self.name}: {reason}")
            else:
                context.notes.append(f"blocks of {parent} share nothing: {reason}")
        if not self._shared:
            raise UsageError(
                f"recovery {self.name}: {type(model).__name__} has no list of blocks. Use --recovery distil."
            )
        super().prepare(model, context)
        self._before = before

    def report(self) -> dict[str, Any]:
        """Which blocks share, what they started from, and numbers before and after."""
        sizes = {"elements_before": self._before, "elements_after": self.weights}
        return super().report() | {"start": self.start, "shared": self._shared} | sizes


def _block_lists(model: nn.Module) -> list[list[str]]:
    """The model's lists of blocks, the one of most numbers first."""
    lists: dict[str, list[str]] = {}
    for block in all_blocks(model):
        lists.setdefault(block.rpartition(".")[0], []).append(block)

    def numbers(blocks: Sequence[str]) -> int:
        return sum(p.numel() for block in blocks for p in model.get_submodule(block).parameters())

    return sorted(lists.values(), key=numbers, reverse=True)


def _refusal(model: nn.Module, blocks: Sequence[str]) -> str | None:
    """Why the central ones of these blocks cannot be one, and what to do; None if they can."""
    if len(blocks) < MIN_BLOCKS:
        return (
            f"{blocks[0].rpartition('.')[0]} has {len(blocks)} blocks, and all but the first and the last would share; "
            f"it takes {MIN_BLOCKS} at least. Use --recovery distil."
        )
    first, *others = (model.get_submodule(block) for block in blocks[1:-1])
    looks = _structure(first)
    for name, other in zip(blocks[2:-1], others, strict=True):
        theirs = _structure(other)
        for key in dict.fromkeys((*looks, *theirs)):
            if looks.get(key) != theirs.get(key):
                remedy = (
                    "Compress it with --form lowrank or pivoted and --allocation uniform, so that blocks are alike"
                    if factored_modules(first) or factored_modules(other)
                    else "Use --recovery distil"
                )
                return (
                    f"{blocks[1]} and {name} differ, so that they cannot share weights: {key} is "
                    f"{looks.get(key, 'missing')} in the one and {theirs.get(key, 'missing')} in the other. {remedy}."
                )
    return None


def _structure(block: nn.Module) -> dict[str, Any]:
    """What must be equal of two blocks: the forms of their modules, and the shapes of their numbers."""
    found: dict[str, Any] = {name: module.spec() for name, module in factored_modules(block).items()}
    found |= {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    return found | {name: tuple(buffer.shape) for name, buffer in block.named_buffers()}


def _start_shared_block(model: nn.Module, central: Sequence[str], start: str) -> None:
    """Give the first central block the numbers that all will have, as parameters of its own, and all its buffers."""
    blocks = [model.get_submodule(block) for block in central]
    pattern = copy.deepcopy(blocks[len(blocks) // 2])
    with torch.no_grad():
        if start == "mean":
            _fill_with_mean(pattern, blocks)
        for name, parameter in pattern.named_parameters():
            owner, key = parameter_owner(blocks[0], name)
            owner._parameters[key] = parameter
        for name, buffer in pattern.named_buffers():
            for block in blocks:
                block.get_buffer(name).copy_(buffer)


def _fill_with_mean(pattern: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """The mean of every parameter; of a form, whose factors are not unique, that of its weight, factored again."""
    forms = factored_modules(pattern)
    for name, parameter in pattern.named_parameters():
        if not name.startswith(tuple(f"{form}." for form in forms)):
            parameter.copy_(torch.stack([block.get_parameter(name).double() for block in blocks]).mean(0))
    for name, form in forms.items():
        reason = _factor_mean(form, [block.get_submodule(name) for block in blocks], name)
        if reason is not None:
            raise UsageError(
                f"recovery option start='mean': {name} of form {form.form} cannot hold the mean: {reason}. Use "
                "start=middle."
            )


def _factor_mean(form: Factored, modules: Sequence[Any], name: str) -> str | None:
    """Store the mean weight and bias; returns why that cannot be."""
    if not isinstance(form, FactoredLinear) or type(form) not in FORMS.values():
        return "no rank alone describes it"
    weight = torch.stack([module.to_dense().double() for module in modules]).mean(0)
    solved = form.solve(Problem(weight), form.block, form.rank, name)
    if form.rank > len(solved.squared):
        return f"its rank is {form.rank}, of a weight of {weight.shape[0]} x {weight.shape[1]}"
    biases = [module.dense_bias() for module in modules]
    bias = None if biases[0] is None else torch.stack([bias.double() for bias in biases]).mean(0)
    return form.store(*solved.truncated(form.rank), bias)
