"""The refinement of a compressed model that is there already: its blocks are trained one after another.

`eckart compress --refine` trains them while the model is made; here it comes from a folder. The teacher says what each
block should put out (see :mod:`eckart.compression.refine_blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from eckart.calibration import show_steps
from eckart.calibration.forward_context import forward_context
from eckart.calibration.layerwise import HiddenStateStore, LayerwiseError, LayerwiseRunner, all_blocks, start_runner
from eckart.compression.output_error import distance_by_token
from eckart.compression.refine_blocks import (
    BlockRefinement,
    NoBackwardError,
    left_as_they_are,
    put_values,
    without_gradients,
)
from eckart.compression.train_block import BlockFit, BlockTraining
from eckart.compression.training_text import TrainingText
from eckart.data import Batch
from eckart.data.inference import evaluating
from eckart.distributed import Processes
from eckart.errors import ModelError, UsageError
from eckart.model import WeightLoader
from eckart.recovery.base import ClosedFormRecovery, RecoveryContext
from eckart.recovery.training.state import STAGE
from eckart.storage.store import EntryStore, MemoryStore


@dataclass
class Block(ClosedFormRecovery):
    """`min || f(x~) - f_0(x) ||^2` over all parameters of each block f, the first block first.

    f_0 and x are the teacher's block and what it reads, x~ what the student's trained blocks before f give it. The last
    block of a model that predicts each token is trained on the KL of its predictions instead.

    Attributes:
        epochs: over the text, for each block.
        rate: learning rate for each part of a block's relative error, as a part of the root mean square of each
            parameter.
    """

    name: ClassVar[str] = "block"
    title: ClassVar[str] = "each block trained to put out what the original's does, one after another"
    paper: ClassVar[str] = "AA-SVD, 2026, arXiv 2604.02119: its block refinement"
    use: ClassVar[str] = (
        "When a refit has brought what it can, and minutes of training may be spent: the best of what needs no labels "
        "and no settings, in the memory of the two models and one block's optimizer."
    )
    needs_teacher: ClassVar[bool] = True
    why_unused: ClassVar[str] = "sets the steps of each block itself; --recovery-option takes its epochs and rate"
    remedy: ClassVar[str] = "Try more data (--num-samples), or train the model as a whole: --recovery distil"

    epochs: int = BlockTraining.epochs
    rate: float = BlockTraining.rate

    def __post_init__(self) -> None:
        self.check_range("[1, inf)", "epochs")
        self.check_range("(0, inf)", "rate")

    def solve(
        self, model: PreTrainedModel, context: RecoveryContext, batches: Sequence[Batch], store: HiddenStateStore
    ) -> None:
        """Train every block, in place; blocks that the journal holds are taken from there.

        Raises:
            UsageError: there is too little text.
            ModelError: one of the models cannot be run block by block, or they have other blocks.
        """
        teacher = context.teacher
        assert teacher is not None
        text = TrainingText.of(batches, Processes())
        if text is None:
            raise UsageError(
                "recovery block: there is too little text: a part must be held out, to tell which epoch is best. "
                "Give more: --num-samples, --data."
            )
        journal: EntryStore = MemoryStore() if context.journal is None else context.journal
        training = BlockTraining(epochs=self.epochs, rate=self.rate, seed=context.recipe.seed)
        with without_gradients(model):
            try:
                with evaluating(teacher):
                    distance = distance_by_token(teacher, text.batches[0], context.pooling)
                both = ((teacher, "before"), (model, "now"))
                before, now = (_start(each, text, store, name) for each, name in both)
                _check_alike(before, now)
                work = BlockRefinement(before, now, text, distance, training)
                steps = now.schedule.steps

                def put(step: int) -> None:
                    put_values(model, steps[step], journal.read(STAGE, f"block {step}")[0])

                def keep(step: int, values: dict[str, Tensor], fit: BlockFit | None) -> None:
                    journal.write(STAGE, f"block {step}", values, {"fit": None if fit is None else vars(fit)})
                    put(step)

                done = [step for step in range(len(steps)) if f"block {step}" in journal.entries(STAGE)]
                for step in done:
                    put(step)
                work.run(show_steps(range(len(steps)), "refining"), done, keep)
            except NoBackwardError as error:
                raise ModelError(
                    f"recovery block: {error}. Nothing can be trained here; --recovery refit fits the factors without "
                    "gradients"
                ) from error
            except LayerwiseError as error:
                raise ModelError(
                    f"recovery block: {type(model).__name__} cannot be run block by block ({error}). Train it as a "
                    "whole: --recovery distil"
                ) from error
        context.notes += left_as_they_are(now)
        self.tokens = sum(batch.num_tokens for batch in batches)
        self.fits = {
            name: BlockFit(**fit) if (fit := journal.read(STAGE, f"block {step}")[1]["fit"]) else None
            for step, name in enumerate(steps)
        }

    def report(self) -> dict[str, Any]:
        """How many blocks were trained, and how near their outputs were and are, on text that was not trained on."""
        found = {name: fit for name, fit in self.fits.items() if fit is not None}
        mean = {
            when: sum(getattr(fit, when) for fit in found.values()) / max(1, len(found)) for when in ("before", "after")
        }
        return {
            "refined": len(found),
            "of": len(self.fits),
            "tokens": self.tokens,
            "output_error": mean,
            "blocks": {name: vars(fit) for name, fit in found.items()},
        }


def _start(model: PreTrainedModel, text: TrainingText, store: HiddenStateStore, name: str) -> LayerwiseRunner:
    weights = WeightLoader(model, None)
    blocks = all_blocks(model)
    inside = [f"{block}.{part}" for block in blocks for part, _ in model.get_submodule(block).named_children()]
    return start_runner(
        model, inside, text.batches, text.batches[0].rows(0, 1), store,
        context=forward_context(model, weights, blocks), device=weights.device, name=name,
    )  # fmt: skip


def _check_alike(before: LayerwiseRunner, now: LayerwiseRunner) -> None:
    """Refuse models whose blocks are not the same, or whose layers are one block."""
    one, other = before.schedule.steps, now.schedule.steps
    if one != other:
        raise ModelError(
            f"recovery block: the teacher runs {len(one)} blocks and the student {len(other)}, or others. Give the "
            "model that it was made from: --teacher MODEL"
        )
    if len(set(other)) < len(other):
        raise ModelError(
            "recovery block: layers that are one and the same block cannot be trained for each of them. Train the "
            "model as a whole: --recovery distil"
        )
