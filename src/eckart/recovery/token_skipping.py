"""Token skipping: between the blocks of an encoder the tokens leave that get the least attention.

Goyal et al. 2020, PoWER-BERT, arXiv 2001.08950; Kim et al. 2022, LTP, arXiv 2107.00910. Both learn with soft masks how
many tokens are needed after each block, then fix that, and train the weights on with what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
"""The last batches of the soft stage, on which the levels are brought to the wished speed-up."""


@dataclass
class TokenSkippingRecovery(Distil):
    """`loss = logits T^2 KL(p_t || p_s) + ... + penalty * (what is left of the tokens)`, then the same without penalty.

    In the soft stage every block's output is multiplied by a mask that is learned. At its end each block's mask becomes
    a level: the fraction of a row's tokens that go on (power-bert: the mean retention parameter), or a threshold of the
    attention that a token receives (ltp). The levels are then bent, all by one number, until the blocks do `1 /
    speedup` of their multiply-adds, and the weights are trained on while tokens leave.

    Attributes:
        rule: "power-bert" or "ltp".
        speedup: multiply-adds of all blocks before over those after; 0: what the masks have learned, as published.
        soft: fraction of the steps that the soft stage takes.
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
    learning_rate: ClassVar[float] = 5e-5
    remedy: ClassVar[str] = "Try a lower speed-up (--recovery-option speedup=1.5), or more data and --epochs"

    hidden: float = 0.0
    rule: str = "power-bert"
    speedup: float = 2.0
    soft: float = 0.5
    penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice(tuple(RULES), "rule")
        self.check_range("(0, 1]", "soft")
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
        return max(1, round(self.soft * self.context.total_steps))

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
        if self._training.levels is not None:
            return total
        self._lengths += self._training.kept_before().tolist()
        if self.rule == "ltp":
            inputs = {name: value.detach() for name, value in batch.items() if name != "labels"}
            self._batches = [*self._batches, inputs][-WATCHED:]
        return total + self.penalty * self._training.penalty()

    def after_backward(self, model: nn.Module, step: int) -> None:
        """What moves the masks counts among the other gradients as if it were a weight."""
        super().after_backward(model, step)
        if self._training.moved.grad is not None:
            self._training.moved.grad /= self._training.rate

    def after_step(self, model: nn.Module, step: int) -> None:
        """Bring the masks back into their range; after the soft stage, fix the levels."""
        super().after_step(model, step)
        if self._training.levels is None:
            self._training.project()
            if step + 1 >= self._soft_steps:
                self._fix_levels(model)

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """Take the masks off: tokens leave the sequence instead."""
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
            found["levels"] = torch.tensor(self._training.levels, dtype=torch.float64)
            numbers = [self._report[key] for key in ("speedup", "multiply_adds", "dense_multiply_adds")]
            found["costs"] = torch.tensor(numbers, dtype=torch.float64)
            found["learned"] = torch.tensor(self._report["learned"], dtype=torch.float64)
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
        if "levels" in state:
            self._training.levels = state["levels"].tolist()
            self._report |= {"levels": self._training.levels, "learned": state["learned"].tolist()}
            self._report |= dict(
                zip(("speedup", "multiply_adds", "dense_multiply_adds"), state["costs"].tolist(), strict=True)
            )

    # -- inside ---------------------------------------------------------------------------------------------

    def _fix_levels(self, model: nn.Module) -> None:
        """Turn what the masks have learned into levels that reach the speed-up."""
        learned = self._training.learned()
        whole = self._cost.mean(self._all_kept())
        wished = whole / self.speedup if self.speedup else math.inf
        if self.rule == "power-bert":
            shape = _below_one(learned)

            def cost(levels: list[float]) -> float:
                return self._cost.mean(self._planned(levels))

            levels = learned if not self.speedup else reach(bent(shape), cost, wished)
        else:

            def cost(levels: list[float]) -> float:
                return self._cost.mean(self._measured(model, levels))

            levels = learned if not self.speedup else reach(raised(learned), cost, wished, 12)
        reached = cost(levels)
        self._training.levels = levels
        self._batches = []
        self._report |= {
            "learned": learned,
            "levels": levels,
            "speedup": whole / reached,
            "multiply_adds": reached,
            "dense_multiply_adds": whole,
        }

    def _all_kept(self) -> Tensor:
        return torch.tensor(self._lengths)[:, None].expand(-1, len(self._places.blocks))

    def _planned(self, fractions: list[float]) -> Tensor:
        """Tokens that each block reads, (rows, blocks)."""
        lengths = torch.tensor(self._lengths)
        return torch.stack([lengths, *(count_kept(lengths, fraction) for fraction in fractions)], dim=1)

    def _measured(self, model: nn.Module, thresholds: list[float]) -> Tensor:
        """The same of thresholds, of the batches that were kept."""
        self._training.levels = thresholds
        found = []
        with evaluating(model):
            for batch in self._batches:
                model(**batch)
                found.append(self._training.kept.cpu())
        self._training.levels = None
        return torch.cat(found)


def _below_one(fractions: list[float]) -> list[float]:
    """A shape that can be bent: where nothing has been learned to leave, a little less after each block."""
    found = []
    for place, fraction in enumerate(fractions):
        found.append(min(max(fraction, 1e-3), 1 - 0.01 * (place + 1)))
    return found
