"""Early exit: heads between the blocks, at which rows that are sure leave the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from eckart.adaptive.attach import behaviors_of
from eckart.adaptive.behavior import Behavior
from eckart.adaptive.exit_rules import RULES, Answers, leave
from eckart.adaptive.walk import Walk
from eckart.data.model_kind import head_problem
from eckart.errors import ModelError, UsageError

POOLINGS = ("first", "mean")
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
HEADS = "exit_heads"
"""Attribute of a model that holds its heads, by the number of blocks before each: no list, which would be of blocks."""


class ExitHead(nn.Module):
    """`y = W_2 tanh(W_1 x + b_1) + b_2`; without width `y = W_2 x + b_2`.

    Args:
        features: of x, the pooled hidden state.
        width: of the layer between; 0 for none.
        outputs: of the model's own head.
    """

    def __init__(self, features: int, width: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(features, width) if width else None
        self.out = nn.Linear(width or features, outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """Answers (N, outputs) of pooled hidden states (N, features)."""
        x: Tensor = pooled if self.dense is None else torch.tanh(self.dense(pooled))
        y: Tensor = self.out(x)
        return y


def pool(hidden: Tensor, real: Tensor, pooling: str) -> Tensor:
    """What a head reads, (r, n).

    Args:
        hidden: states (r, t, n).
        real: which of them are tokens, (r, t) bool.
        pooling: one of :data:`POOLINGS`.
    """
    if pooling == "first":
        return hidden[:, 0]
    weight = real.to(hidden.dtype)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


@dataclass
class EarlyExit(Behavior):
    """After some blocks a head answers for each row, and rows whose answer is sure go no further.

    Attributes:
        exits: after how many blocks, rising.
        rule: one of :data:`eckart.adaptive.exit_rules.RULES`.
        threshold: "entropy": nats, 0 for none to leave; "patience": heads in a row that agree with the one before.
        pooling: what a head reads: the "first" token, or the "mean" of the real ones.
        features: of the hidden state.
        width: of the layer inside a head; 0 for none.
        outputs: of the model's own head.
        problem: of the model's own head, as transformers calls it.
        tolerance: of "patience" for numbers: those that differ by less agree. None for classes.
    """

    name: ClassVar[str] = "early-exit"
    title: ClassVar[str] = "rows that are sure leave the batch at a head between two blocks"
    paper: ClassVar[str] = "DeeBERT: Xin et al. 2020, ACL, 2020.acl-main.204"
    keywords: ClassVar[tuple[str, ...]] = ("exit_threshold",)

    exits: tuple[int, ...]
    rule: str
    threshold: float
    pooling: str
    features: int
    width: int
    outputs: int
    problem: str
    tolerance: float | None = None

    def __post_init__(self) -> None:
        self.exits = tuple(self.exits)
        rising = self.exits and all(type(place) is int for place in self.exits)
        wrong = {
            f"exits {list(self.exits)}": not rising or list(self.exits) != sorted(set(self.exits)) or self.exits[0] < 1,
            f"rule {self.rule!r}": self.rule not in RULES or (self.rule == "entropy" and self.problem == "regression"),
            f"threshold {self.threshold!r}": not _is_threshold(self.threshold, self.rule),
            f"pooling {self.pooling!r}": self.pooling not in POOLINGS,
            f"problem {self.problem!r}": self.problem not in PROBLEMS,
            f"tolerance {self.tolerance!r}": (self.tolerance is None) == (self.problem == "regression")
            or not (self.tolerance is None or self.tolerance >= 0),
            "sizes": any(type(size) is not int or size < 0 for size in (self.features, self.width, self.outputs)),
        }
        if any(wrong.values()):
            listed = ", ".join(name for name, is_wrong in wrong.items() if is_wrong)
            raise UsageError(
                f"early exit: {listed} cannot be: the threshold of entropy is a number from 0 on, that of patience a "
                "whole one from 1 on, and a regression takes patience with a tolerance"
            )

    def spec(self) -> dict[str, Any]:
        """See :class:`Behavior`."""
        found = {**vars(self), "exits": list(self.exits)}
        return {key: value for key, value in found.items() if value is not None}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """See :class:`Behavior`."""
        return cls(**spec)

    def misfit(self, model: PreTrainedModel, blocks: int) -> str | None:
        """A model without the head whose answers are given early."""
        if head_problem(model) is None:
            return "it has no head for one answer a text, which could be given early"
        if self.exits[-1] >= blocks:
            return f"it has {blocks} blocks, and the last exit is after block {self.exits[-1]}"
        outputs = getattr(model.config, "num_labels", self.outputs)
        return None if outputs == self.outputs else f"it has {outputs} outputs, and its exits {self.outputs}"

    def modules(self) -> dict[str, nn.Module]:
        """One head for each exit."""
        heads = {str(place): ExitHead(self.features, self.width, self.outputs) for place in self.exits}
        return {HEADS: nn.ModuleDict(heads)}

    def in_words(self, blocks: int) -> str:
        """See :class:`Behavior`."""
        where = f"early exit after block {', '.join(map(str, self.exits))} of {blocks}"
        if self.rule == "entropy":
            return f"{where}, where the entropy of the answer is below {self.threshold:.4g}"
        within = "" if self.tolerance is None else f" within {self.tolerance:.4g}"
        times = f"{int(self.threshold)} time{'s' if self.threshold > 1 else ''}"
        return f"{where}, where the answer has stayed the same{within} {times}"

    def begin(self, walk: Walk) -> None:
        """See :class:`Behavior`."""
        given = walk.options[self.name].get("exit_threshold")
        if given is not None and not _is_threshold(given, self.rule):
            raise UsageError(f"exit_threshold={given!r}: give a number from 0 on, of patience a whole one from 1 on.")
        walk.memory[self.name]["threshold"] = self.threshold if given is None else given

    def after_block(self, walk: Walk) -> None:
        """Rows that are sure leave."""
        if walk.done not in self.exits or walk.is_last:
            return
        memory = walk.memory[self.name]
        if "blocks" not in memory:
            memory["blocks"] = torch.full((walk.batch,), walk.blocks, device=walk.hidden.device)
            memory["logits"] = None
            memory["answers"] = Answers.none(walk.batch, walk.hidden.device)
        head = walk.model.get_submodule(f"{HEADS}.{walk.done}")
        logits = head(pool(walk.hidden, walk.real, self.pooling))
        leaves, answers = leave(
            logits, memory["answers"], rule=self.rule, threshold=memory["threshold"], problem=self.problem,
            tolerance=self.tolerance,
        )  # fmt: skip
        memory["answers"] = answers.of(~leaves)
        if bool(leaves.any()):
            if memory["logits"] is None:
                memory["logits"] = logits.new_zeros(walk.batch, logits.shape[-1])
            memory["logits"] = memory["logits"].index_copy(0, walk.rows[leaves], logits[leaves])
            memory["blocks"][walk.rows[leaves]] = walk.done
            walk.keep_rows(~leaves)

    def end(self, walk: Walk, output: Any) -> Any:
        """Put the answers of rows that left into the model's output, and say in it where each left."""
        memory = walk.memory[self.name]
        if "blocks" not in memory:  # of a batch without rows
            return output
        blocks, early = memory["blocks"], memory["logits"]
        labels = walk.inputs.get("labels")
        if early is not None:
            place = int(labels is not None)
            last = output[place] if isinstance(output, tuple) else output.logits
            logits = torch.where((blocks < walk.blocks)[:, None].to(last.device), early.to(last), last)
            loss = None if labels is None else self._loss(logits, labels)
            if isinstance(output, tuple):
                head = (logits,) if loss is None else (loss, logits)
                return (*head, *output[place + 1 :])
            output.logits = logits
            if loss is not None:
                output.loss = loss
        if not isinstance(output, tuple):
            output.exit_blocks = blocks  # no key of it: whoever takes its entries in turn gets those of its class
        return output

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss as transformers' classes have it."""
        if self.problem == "regression":
            return functional.mse_loss(logits.squeeze(), labels.to(logits).squeeze())
        if self.problem == "single_label_classification":
            return functional.cross_entropy(logits.view(-1, self.outputs), labels.view(-1))
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits))


def set_early_exit(
    model: PreTrainedModel,
    *,
    threshold: float | None = None,
    rule: str | None = None,
    tolerance: float | None = None,
) -> None:
    """Change when rows leave a model, in place; `save_pretrained` then writes it so.

    For one call alone: `model(**inputs, exit_threshold=0.1)`.

    Args:
        model: one that has an early exit.
        threshold: "entropy": nats below which an answer is sure, 0 for none to leave; "patience": how many heads in a
            row must agree with the one before them.
        rule: "entropy" or "patience".
        tolerance: numbers of a regression that differ by less agree.

    Raises:
        ModelError: the model has no early exit.
        UsageError: a value cannot be.
    """
    behavior = behaviors_of(model).get(EarlyExit.name)
    if behavior is None:
        raise ModelError(
            f"{type(model).__name__} has no early exit. Give it one: eckart tune MODEL --recovery early-exit --data "
            "DATA"
        )
    if rule is not None and rule != behavior.rule and threshold is None:
        raise UsageError(f"rule={rule!r}: a threshold of {behavior.rule} means nothing to it. Give one: threshold=...")
    given = {"threshold": threshold, "rule": rule, "tolerance": tolerance}
    changed = EarlyExit.from_spec({**behavior.spec(), **{key: v for key, v in given.items() if v is not None}})
    vars(behavior).update(vars(changed))


def _is_threshold(value: Any, rule: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return value >= 0 if rule == "entropy" else value >= 1 and value == int(value)
