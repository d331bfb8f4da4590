"""Early exit: heads after some blocks, trained on the frozen model, and the threshold at which rows leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.adaptive import attach, detach
from eckart.adaptive.early_exit import HEADS, POOLINGS, EarlyExit, ExitHead, pool
from eckart.adaptive.exit_rules import RULES
from eckart.calibration.layerwise import HiddenStateStore
from eckart.data import Batch
from eckart.data.model_kind import head_problem
from eckart.errors import UsageError
from eckart.recovery.base import ClosedFormRecovery, RecoveryContext
from eckart.recovery.exits.choose import ExitPoint, choose_point, list_points, measure_quality
from eckart.recovery.exits.heads import head_loss, train_head
from eckart.recovery.exits.states import ExitStates, find_blocks, record_states, try_exits

HELD_OUT = 0.2
"""Fraction of the rows on which the threshold is chosen, where no others are; no head is trained on them."""

MAX_DROP = 0.5
"""Points that may be lost where nothing else is asked for."""

SHOWN = 12
"""Thresholds in the report, with what they do."""


@dataclass
class EarlyExitRecovery(ClosedFormRecovery):
    """`min sum_i T^2 KL(p_last(x_i) || p_k(h_k(x_i))) + labels CE(p_k(h_k(x_i)), y_i)` over the head p_k of each exit.

    h_k is the pooled hidden state after block k; the model itself stays as it is. A row leaves where its answer is
    sure, by the rule "entropy" or "patience", and the batch goes on without it. One of `speedup`, `max_drop` and
    `threshold` says when; on rows that are held out, what each threshold brings and costs is known.

    Attributes:
        after: numbers of blocks with an exit, separated by commas; "" for every block but the last.
        rule: "entropy": `H(p) < threshold` (DeeBERT); "patience": the answer stayed the same `threshold` times (PABEE,
            Zhou et al., NeurIPS 2020), which is what a regression has. "" for entropy, in a regression for patience.
        speedup: multiply-adds of the whole model for each one that is done, a mean over held-out rows.
        max_drop: points of held-out accuracy (or agreement with the whole model, or correlation times 100) that may be
            lost, a standard error of what is lost included; 0.5 where none of the three is given.
        threshold: of the rule.
        tolerance: numbers of a regression that differ by less agree; goes with `threshold`.
        pooling: what a head reads: the "first" token, or the "mean" of all; "" for what heads learn better from,
            by their loss on held-out rows.
        width: of the layer inside a head; 0 for a linear head, None for the width of the model.
        epochs: over the kept states, for each head.
        rate: highest learning rate.
        temperature: T of the distillation.
        labels: weight of the labels, where there are any.
        choose_on: "data": the threshold is chosen on a fifth of the data, which no head is trained on; "eval": on what
            the model is scored on, as `--eval-data` names it. A model is surer of rows that it was trained on itself.
    """

    name: ClassVar[str] = "early-exit"
    title: ClassVar[str] = "heads after blocks, at which rows that are sure leave the batch; the model stays as it is"
    paper: ClassVar[str] = "DeeBERT: Xin et al. 2020, ACL, 2020.acl-main.204; PABEE: Zhou et al. 2020, arXiv 2006.04152"
    use: ClassVar[str] = (
        "A classifier or regressor answers many easy texts: they leave after the first blocks. It takes one pass over "
        "the text and no labels, combines with factors, and the threshold can be changed at every call."
    )
    students: ClassVar[str] = "classifier"
    own_teacher: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True
    most_rows: ClassVar[int | None] = 20_000
    keeps_behaviors: ClassVar[tuple[str, ...]] = ("early-exit", "token-skipping")
    why_unused: ClassVar[str] = (
        "trains small heads on kept hidden states; --recovery-option takes their epochs and rate"
    )
    remedy: ClassVar[str] = "Ask for less: --recovery-option speedup=1.5, or max_drop=0.2"

    after: str = ""
    rule: str = ""
    speedup: float | None = None
    max_drop: float | None = None
    threshold: float | None = None
    tolerance: float | None = None
    pooling: str = ""
    width: int | None = None
    epochs: int = 10
    rate: float = 1e-3
    temperature: float = 1.0
    labels: float = 1.0
    choose_on: str = "data"

    def __post_init__(self) -> None:
        self.check_choice(("", *RULES), "rule")
        self.check_choice(("data", "eval"), "choose_on")
        self.check_choice(("", *POOLINGS), "pooling")
        self.check_range("[1, inf)", "speedup", "epochs")
        self.check_range("[0, inf)", "max_drop", "threshold", "tolerance", "width", "labels")
        self.check_range("(0, inf)", "rate", "temperature")
        given = [key for key in ("speedup", "max_drop", "threshold") if getattr(self, key) is not None]
        if len(given) > 1:
            raise UsageError(
                f"recovery early-exit: {' and '.join(given)} each say when rows leave. Give one of them: "
                f"--recovery-option {given[0]}={getattr(self, given[0]):g}"
            )
        if self.tolerance is not None and self.threshold is None:
            raise UsageError("recovery early-exit: tolerance goes with threshold: --recovery-option threshold=2")
        self._exits = self._read_places()

    def _read_places(self) -> tuple[int, ...] | None:
        words = [word.strip() for word in str(self.after).split(",") if word.strip()]
        if not all(word.isdecimal() and int(word) > 0 for word in words):
            self._refuse("after", "numbers of blocks, such as 2,4")
        return tuple(sorted({int(word) for word in words})) or None

    @property
    def shrinks(self) -> bool:
        """It does less, which is what was asked for."""
        return True

    def refusal(self, task: str) -> str | None:
        """One answer a text can be given early."""
        answers = ("classification", "regression", "logits")
        return None if task in answers else "it gives early the one answer that a classifier has for a text"

    def solve(
        self, model: PreTrainedModel, context: RecoveryContext, batches: Sequence[Batch], store: HiddenStateStore
    ) -> None:
        """Give the model heads and a threshold, in place.

        Raises:
            UsageError: its head is for something else, or settings do not fit it.
            ModelError: it cannot be walked block by block, or rows cannot leave its batch.
        """
        problem = head_problem(model)
        if problem is None:
            raise UsageError(
                f"recovery early-exit: {type(model).__name__} has no head for one answer a text, which could be given "
                "early. Give a classifier or regressor: AutoModelForSequenceClassification"
            )
        rule = self._rule(problem)
        detach(model, EarlyExit.name)
        blocks = find_blocks(model, batches[0].rows(0, 1))
        exits = self._places(len(blocks))
        own = try_exits(model, blocks, exits, batches)
        pools = (self.pooling,) if self.pooling else (own, *(each for each in POOLINGS if each != own))
        states = record_states(model, blocks, exits, partial(_pool_all, pools), batches)
        if self.choose_on == "eval":
            held = record_states(model, blocks, exits, partial(_pool_all, pools), context.held_out)
        else:
            trained_on, kept = self._split(len(states.logits), context)
            states, held = states.of(trained_on), states.of(kept)
        size: int = model.config.get_text_config().hidden_size
        width = size if self.width is None else self.width
        tried = []
        for number, pooling in enumerate(pools):
            mine, others = states.part(number, len(pools)), held.part(number, len(pools))
            heads = self._train(mine, problem, width, context)
            given = [head(others.states[place]) for place, head in heads.items()]
            rest = {"temperature": self.temperature, "weight": self.labels}
            far = sum(float(head_loss(each, held.logits, held.labels, problem, **rest)) for each in given)
            tried.append((far, pooling, heads, given))
        _, pooling, heads, given = min(tried, key=lambda each: each[0])
        behavior = EarlyExit(
            exits=exits, rule=rule, threshold=1.0, pooling=pooling, features=size, problem=problem, width=width,
            outputs=model.config.num_labels or 1, tolerance=0.0 if problem == "regression" else None,
        )  # fmt: skip
        head = next(iter(heads.values()))
        size_of_head = sum(parameter.numel() for parameter in head.parameters() if parameter.dim() == 2)
        chosen = self._choose(held, given, behavior, size_of_head, context)
        behavior.threshold, behavior.tolerance = chosen.threshold, chosen.tolerance
        attach(model, behavior, blocks)
        for place, trained in heads.items():
            model.get_submodule(f"{HEADS}.{place}").load_state_dict(trained.state_dict())
        added = sum(parameter.numel() for each in heads.values() for parameter in each.parameters())
        self._note(len(states.logits), held, behavior, chosen, len(blocks), added)

    def _train(self, states: ExitStates, problem: str, width: int, context: RecoveryContext) -> dict[int, ExitHead]:
        """A head for each exit."""
        return {
            place: train_head(
                found, states.logits, states.labels, problem=problem, width=width, epochs=self.epochs, rate=self.rate,
                temperature=self.temperature, weight=self.labels, seed=context.recipe.seed,
            )
            for place, found in states.states.items()
        }  # fmt: skip

    def _rule(self, problem: str) -> str:
        rule = self.rule or ("patience" if problem == "regression" else "entropy")
        if problem == "regression" and rule == "entropy":
            raise UsageError("recovery early-exit: a regression has no entropy: --recovery-option rule=patience")
        if self.threshold is not None and rule == "patience" and not (self.threshold >= 1 and self.threshold % 1 == 0):
            self._refuse("threshold", "a whole number from 1 on, of patience")
        if self.threshold is not None and (self.tolerance is None) == (problem == "regression"):
            words = "needs a tolerance" if problem == "regression" else "takes no tolerance"
            raise UsageError(f"recovery early-exit: the threshold of a {problem} {words}: --recovery-option tolerance")
        return rule

    def _places(self, blocks: int) -> tuple[int, ...]:
        exits = self._exits or tuple(range(1, blocks))
        if exits[-1] >= blocks:
            raise UsageError(
                f"recovery early-exit: after={self.after}, but the model has {blocks} blocks, and nothing is left to "
                f"save after the last: --recovery-option after={','.join(map(str, range(1, blocks)))}"
            )
        return exits

    def _split(self, rows: int, context: RecoveryContext) -> tuple[Tensor, Tensor]:
        """Rows that heads are trained on, and those on which the threshold is chosen."""
        count = max(1, round(HELD_OUT * rows))
        if rows - count < 1:
            raise UsageError(
                "recovery early-exit: there is too little text to train heads on a part of it and choose a threshold "
                "on the rest. Give more: --num-samples, --data."
            )
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(context.recipe.seed))
        return order[count:].sort().values, order[:count].sort().values

    def _choose(
        self, held: ExitStates, given: list[Tensor], behavior: EarlyExit, head: int, context: RecoveryContext
    ) -> ExitPoint:
        problem = behavior.problem
        costs, whole_cost = held.costs_of(behavior.exits, head)
        rest = (held.logits, held.labels, costs, whole_cost)
        self.quality = measure_quality(held.logits, held.logits, held.labels, problem)
        fixed = None if self.threshold is None else [(float(self.threshold), self.tolerance)]
        self.points = list_points(given, *rest, rule=behavior.rule, problem=problem, candidates=fixed)
        if fixed is not None:
            return self.points[0]
        drop = MAX_DROP if self.speedup is None and self.max_drop is None else self.max_drop
        chosen, note = choose_point(self.points, self.quality, speedup=self.speedup, max_drop=drop)
        if note is not None:
            context.notes.append(f"early exit: {note}")
        return chosen

    def _note(
        self, trained_on: int, held: ExitStates, behavior: EarlyExit, chosen: ExitPoint, blocks: int, added: int
    ) -> None:
        what = "labels" if held.labels is not None else "the whole model's answers"
        rows = len(held.logits)
        places = [*behavior.exits, blocks]
        left = ", ".join(f"{100 * part:.0f}% after {place}" for place, part in zip(places, chosen.left, strict=True))
        some = self.points[:: max(1, len(self.points) // SHOWN)]
        self.found = {
            "lines": [
                f"{behavior.in_words(blocks)}; heads trained on {trained_on} rows",
                f"on {rows} held-out rows: {chosen.speedup:.2f}x fewer multiply-adds, {self.quality:.2f} -> "
                f"{chosen.quality:.2f} by {what}; rows leave {left}",
            ],
            "behavior": {key: value for key, value in behavior.spec().items() if key != "features"},
            "blocks": blocks,
            "rows": trained_on,
            "held_out": {"rows": rows, "against": what, "whole": self.quality, **chosen.as_dict()},
            "thresholds": [point.as_dict() for point in some],
            "added_parameters": added,
        }

    def report(self) -> dict[str, Any]:
        """The exits, what the threshold does to held-out rows, and what others would."""
        return self.found


def _pool_all(pools: Sequence[str], hidden: Tensor, real: Tensor) -> Tensor:
    """All that heads may read, side by side."""
    return torch.cat([pool(hidden, real, each) for each in pools], -1)
