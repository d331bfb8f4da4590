"""Token skipping: between the blocks of an encoder the tokens leave that get the least attention.

Goyal et al. 2020, PoWER-BERT, arXiv 2001.08950; Kim et al. 2022, LTP, arXiv 2107.00910. Both learn with soft masks how
many tokens are needed after each block, then fix that, and train the weights on with what is left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.adaptive import attach, detach
from eckart.adaptive.token_skipping import CHANGE, RULES, TokenSkipping
from eckart.data.inference import evaluating
from eckart.errors import UsageError
from eckart.forms.transformers_internals import attention_of
from eckart.linalg import bent, count_kept, raised, reach
from eckart.recovery.base import RecoveryContext
from eckart.recovery.distil import Distil
from eckart.recovery.skipping.costs import BlockCost
from eckart.recovery.skipping.training import SkipTraining
from eckart.recovery.skipping.trial import find_places

TRAVEL = 2.0
"""How often a parameter of the masks could cross its range in the soft stage, at the learning rate that falls to 0."""

WATCHED = 8
"""The last batches of the soft stage, on which levels are brought to the wished speed-up and compared."""

LENGTHS = 4096
"""The last rows of the soft stage whose lengths say what a schedule saves."""

POWERS = (1.0, 1.5, 2.0, 3.0)
"""Schedules that are tried beside the learned one: `f_l = exp(-c (l / L)^a)` for these a; a larger one waits longer."""


@dataclass
class TokenSkippingRecovery(Distil):
    """`loss = logits T^2 KL(p_t || p_s) + ... + penalty * (what is left of the tokens)`, then the same without penalty.

    In the soft stage every block's output is multiplied by a mask that is learned, while the weights stand still. At
    its end each block's mask becomes a level: the fraction of a row's tokens that go on (power-bert: the mean retention
    parameter), or a threshold of the attention that a token receives (ltp). The levels are bent, all by one number,
    until the blocks do `1 / speedup` of their multiply-adds, and so are a few schedules that are not learned; those
    whose answers are nearest the teacher's on the last batches are taken. Then the weights are trained while tokens
    leave.

    Other than in the papers, levels are relative: a fraction of a row's own length, a multiple of the mean attention
    of its tokens; and tokens leave after a block, not inside it, so that any block will do.

    Attributes:
        rule: "power-bert" or "ltp".
        speedup: multiply-adds of all blocks before over those after; 0: what the masks have learned, as published.
        soft: fraction of the steps that the soft stage takes; 0: no mask is learned.
        penalty: weight of what is left, in the soft stage.
    """

    name: ClassVar[str] = "token-skipping"
    title: ClassVar[str] = "tokens that get little attention leave between the blocks; masks are learned, then weights"
    paper: ClassVar[str] = (
        "PoWER-BERT: Goyal et al. 2020, ICML, arXiv 2001.08950; LTP: Kim et al. 2022, KDD, arXiv 2107.00910"
    )
    use: ClassVar[str] = (
        "An encoder reads texts of tens or hundreds of tokens, and most of them matter little for the answer: it then "
        "computes less for each text, with the weights that it has, factored or not."
    )
    students: ClassVar[str] = "encoder"
    own_teacher: ClassVar[bool] = True
    keeps_behaviors: ClassVar[tuple[str, ...]] = ("token-skipping",)
    learning_rate: ClassVar[float] = 3e-5
    remedy: ClassVar[str] = "Try a lower speed-up (--recovery-option speedup=1.25), or more data and --epochs"

    hidden: float = 0.0
    rule: str = "power-bert"
    speedup: float = 1.5
    soft: float = 0.25
    penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice(tuple(RULES), "rule")
        self.check_range("[0, 1]", "soft")
        self.check_range("[0, inf)", "penalty", "speedup")
        if 0 < self.speedup < 1:
            raise UsageError(f"recovery {self.name}: speedup={self.speedup:g} would be slower; give 1 or more, or 0")
        self._lengths: list[int] = []
        self._batches: list[dict[str, Tensor]] = []
        self._report: dict[str, Any] = {}

    @property
    def shrinks(self) -> bool:
        """It does less, whatever it scores."""
        return True

    @property
    def _soft_steps(self) -> int:
        least = 1 if self.soft else min(WATCHED, self.context.total_steps)
        return max(least, round(self.soft * self.context.total_steps))

    def prepare(self, model: PreTrainedModel, context: RecoveryContext) -> None:
        """Find where tokens can leave, and put the masks there.

        Raises:
            ModelError: tokens cannot leave this model.
            UsageError: it cannot become as fast as that.
        """
        super().prepare(model, context)
        detach(model, TokenSkipping.name)
        modes = context.pooling.modes if context.pooling is not None else ("cls",)
        self._stays = ("first", "last") if "lasttoken" in modes else ("first",)
        self._places = find_places(model, self._stays)
        self._attention_before = attention_of(model.config)
        if self._places.attention == CHANGE:
            context.notes.append(
                f"{type(model).__name__} shows no attention: tokens are scored by how much a block changes their state"
            )
        else:
            model.set_attn_implementation("eager")
        self._cost = BlockCost.of(model, self._places.blocks)
        most = len(self._places.blocks)
        if self.speedup >= most:
            raise UsageError(
                f"recovery {self.name}: speedup={self.speedup:g} cannot be: the first of {most} blocks reads all "
                f"tokens, so it stays below {most}; give less"
            )
        rate = context.recipe.learning_rate if context.recipe is not None else None
        reached = (rate or self.learning_rate) * self._soft_steps / 2
        self._training = SkipTraining(self.rule, self._places, self._stays, TRAVEL / reached)
        self._training.install(model, self._places)
        self._report = {"scores": self._places.attention, "trial_error": self._places.error}

    def loss(self, outputs: Any, teacher_outputs: Any, batch: Mapping[str, Tensor], task_loss: Tensor) -> Tensor:
        """The distillation's, and what is left of the tokens while that is learned."""
        total = super().loss(outputs, teacher_outputs, batch, task_loss)
        if self._training.levels is not None and self.rule != "ltp":
            return total
        inputs = {name: value.detach() for name, value in batch.items() if name != "labels"}
        self._batches = [*self._batches, inputs][-WATCHED:]
        if self._training.levels is not None:
            return total
        self._lengths = [*self._lengths, *self._training.kept_before().tolist()][-LENGTHS:]
        return total + self.penalty * self._training.penalty()

    def after_backward(self, model: nn.Module, step: int) -> None:
        """While masks are learned the weights stand still, or they would learn to live with masks that change."""
        super().after_backward(model, step)
        if self._training.levels is not None:
            return
        for parameter in model.parameters():
            if not (self.soft and parameter is self._training.moved):
                parameter.grad = None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Bring the masks back into their range; after the soft stage, fix the levels."""
        super().after_step(model, step)
        if self._training.levels is None:
            self._training.project()
            if step + 1 >= self._soft_steps:
                self._fix_levels(model)

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """Take the masks off: tokens leave the sequence instead."""
        if self.rule == "ltp" and self.speedup and self._batches:
            self._reach_again(model)
        levels = self._training.levels
        assert levels is not None
        self._training.uninstall(model)
        if self._attention_before is not None:
            model.set_attn_implementation(self._attention_before)
        skipping = TokenSkipping(self.rule, levels, self._places.attention, self._stays)
        attach(model, skipping, self._places.blocks)
        return super().finish(model)

    def report(self) -> dict[str, Any]:
        """The levels, and what they save."""
        return super().report() | {"rule": self.rule, "asked_speedup": self.speedup} | self._report

    def state(self) -> dict[str, Tensor]:
        """What the levels are fixed on, and the levels."""
        found = super().state() | {"lengths": torch.tensor(self._lengths)}
        if self._training.levels is not None:
            words = json.dumps(self._report).encode()
            found["report"] = torch.tensor(list(words), dtype=torch.uint8)
        for place, batch in enumerate(self._batches):
            found |= {f"batch/{place}/{name}": value for name, value in batch.items()}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with these."""
        super().restore(state)
        self._lengths = state["lengths"].tolist()
        self._batches = []
        for place in range(WATCHED):
            prefix = f"batch/{place}/"
            batch = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            self._batches += [batch] if batch else []
        if "report" in state:
            self._report = json.loads(bytes(state["report"].tolist()))
            self._training.levels = self._report["levels"]

    # -- inside ---------------------------------------------------------------------------------------------

    def _fix_levels(self, model: nn.Module) -> None:
        """Turn what the masks have learned into levels: those of the wished speed-up that change the answers least."""
        learned = self._training.learned()
        whole = self._cost.mean(self._all_kept())
        tried: dict[str, dict[str, Any]] = {}
        for name, levels in self._candidates(model, learned, whole).items():
            reached = self._cost_at(model, levels)
            tried[name] = {"levels": levels, "distance": self._distance(model, levels), "speedup": whole / reached}
        best = min(tried, key=lambda name: float(tried[name]["distance"]))
        self._training.levels = tried[best]["levels"]
        self._batches = []
        self._report |= {"learned": learned, "tried": tried, "chosen": best, **tried[best]}
        self._report |= {"multiply_adds": whole / tried[best]["speedup"], "dense_multiply_adds": whole}

    def _reach_again(self, model: nn.Module) -> None:
        """Bring thresholds to the wished speed-up again: training has changed what they let through."""
        levels = self._training.levels
        assert levels is not None

        cost = partial(self._cost_at, model)
        whole = cost([0.0] * len(levels))
        levels = reach(raised(levels), cost, whole / self.speedup, halvings=10)
        reached = cost(levels)
        self._report |= {
            "levels": levels, "speedup": whole / reached, "multiply_adds": reached, "dense_multiply_adds": whole,
        }  # fmt: skip
        self._training.levels, self._batches = levels, []

    def _candidates(self, model: nn.Module, learned: list[float], whole: float) -> dict[str, list[float]]:
        """Levels to try, of the wished speed-up."""
        if not self.speedup:
            return {"learned": learned}

        cost = partial(self._cost_at, model)
        wished = whole / self.speedup
        if self.rule == "ltp":
            shapes = {"learned": learned, "rising": self._training.start().tolist()}
            return {name: reach(raised(shape), cost, wished, halvings=10) for name, shape in shapes.items()}
        ends = range(1, len(learned) + 1)
        shapes = {f"power {power:g}": [math.exp(-((i / len(learned)) ** power)) for i in ends] for power in POWERS}
        if self.soft:
            shapes["learned"] = [
                min(max(fraction, 1e-3), 1 - 1e-3 * i) for i, fraction in zip(ends, learned, strict=True)
            ]
        return {name: reach(bent(shape), cost, wished) for name, shape in shapes.items()}

    def _distance(self, model: nn.Module, levels: list[float]) -> float:
        """How far the answers are from the teacher's, by the loss of the training, on the batches that were kept."""
        before = dict(self._sums), dict(self._counts)
        teacher: Any = self.context.teacher
        arguments = {f"output_{name}": True for name in self.needed_outputs}
        total = 0.0
        with evaluating(model), self._hard(levels):
            for batch in self._batches:
                outputs, taught = model(**batch, **arguments), teacher(**batch, **arguments)
                zero = torch.zeros((), device=batch["input_ids"].device)
                total += float(super().loss(outputs, taught, batch, zero)) * len(batch["input_ids"])
        self._sums, self._counts = before
        return total / sum(len(batch["input_ids"]) for batch in self._batches)

    @contextmanager
    def _hard(self, levels: list[float]) -> Iterator[None]:
        """Tokens leave at these levels inside."""
        before, self._training.levels = self._training.levels, levels
        try:
            yield
        finally:
            self._training.levels = before

    def _all_kept(self) -> Tensor:
        return torch.tensor(self._lengths)[:, None].expand(-1, len(self._places.blocks))

    def _cost_at(self, model: nn.Module, levels: list[float]) -> float:
        """Multiply-adds of a row, a mean over the rows that were kept."""
        return self._cost.mean(self._read(model, levels))

    def _read(self, model: nn.Module, levels: list[float]) -> Tensor:
        """Tokens that each block reads, (rows, blocks)."""
        if self.rule == "power-bert":
            lengths = torch.tensor(self._lengths)
            return torch.stack([lengths, *(count_kept(lengths, fraction) for fraction in levels)], dim=1)
        found = []
        with evaluating(model), self._hard(levels):
            for batch in self._batches:
                model(**batch)
                found.append(self._training.kept.cpu())
        return torch.cat(found)
