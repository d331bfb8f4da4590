"""What every way of recovering by training is: a recovery that the training loop calls at fixed points.

A way of recovering is one file with one class on :class:`Recovery`, and one line in `RECOVERIES`. Its settings are the
fields of its dataclass; `--recovery-option name=value` sets them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.calibration.layerwise import HiddenStateStore
from eckart.data import Batch, Pooling
from eckart.errors import UsageError


@dataclass
class RecoveryContext:
    """What a recovery is told about the training it takes part in.

    Attributes:
        teacher: the model that is learnt from, in evaluation mode; None where there is none.
        task: "classification", "regression", "masked", "causal" or "embedding".
        recipe: what was asked for.
        total_steps: optimizer steps of the whole training.
        head: names of modules that were newly initialized, and of a classifier's own head: always trained.
        notes: a recovery writes here what it could not do as asked.
        step: the optimizer step that is being made, from 0; the training loop keeps it.
        pooling: how tokens become the sentence embedding that task "embedding" learns.
    """

    teacher: PreTrainedModel | None
    task: str
    recipe: Any
    total_steps: int
    head: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    step: int = 0
    pooling: Pooling | None = None

    def in_head(self, name: str) -> bool:
        """Whether a parameter belongs to the head."""
        return any(name.startswith(f"{head}.") for head in self.head)


@dataclass
class Recovery:
    """A recovery that trains every weight on the task's own loss; others override what they do differently.

    Class attributes:
        name: as `--recovery` takes it.
        title: one line for tables.
        paper: authors, year, identifier; "" for common knowledge.
        needs_teacher: whether there must be a teacher.
        learning_rate: where none is asked for.
        starts_dense: whether it makes its own factors or updates, of a model that has none.
        unread: options of the recipe that mean nothing to it: refused where they are given.
        remedy: what to try where the model did not get better.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 5e-5
    starts_dense: ClassVar[bool] = False
    unread: ClassVar[tuple[str, ...]] = ()
    remedy: ClassVar[str] = "Try a lower --learning-rate, more data, or fewer --epochs"

    def refusal(self, task: str) -> str | None:
        """Why a task cannot be learnt in this way, or None."""
        return "it learns from the task's own loss, and there is none" if task == "embedding" else None

    def within(self, interval: str, *keys: str) -> None:
        """Check settings that are numbers.

        Args:
            interval: as mathematics writes it: "[0, 1)" is 0 and more, and less than 1; "[1, inf)" is 1 and more.
            keys: names of the settings; None is no number, and passes.

        Raises:
            UsageError: naming the first that is outside.
        """
        low, high = map(float, interval[1:-1].split(","))
        for key in keys:
            value = getattr(self, key)
            if value is None:
                continue
            above = value >= low if interval[0] == "[" else value > low
            below = value <= high if interval[-1] == "]" else value < high
            if not (above and below):
                self._refuse(key, f"in {interval}")

    def one_of(self, known: Collection[str], key: str) -> None:
        """Check a setting that is a word.

        Raises:
            UsageError: naming those that are known.
        """
        if getattr(self, key) not in known:
            self._refuse(key, f"one of {', '.join(known)}")

    def _refuse(self, key: str, wanted: str) -> None:
        usual = getattr(type(self), key)
        raise UsageError(
            f"recovery {self.name}: {key} must be {wanted}, not {getattr(self, key)!r}; the default is "
            f"--recovery-option {key}={usual}"
        )

    @property
    def wants(self) -> frozenset[str]:
        """Logits alone."""
        return frozenset()

    @property
    def shrinks(self) -> bool:
        """The size stays."""
        return False

    def prepare(self, model: PreTrainedModel, context: RecoveryContext) -> None:
        """Keep the context; count what is trained."""
        self.context = context
        self.count(model)

    def count(self, model: nn.Module) -> None:
        """Count all weights and those that are trained, for the report."""
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.weights = sum(p.numel() for p in model.parameters())

    def loss(self, outputs: Any, teacher_outputs: Any, batch: Mapping[str, Tensor], task_loss: Tensor) -> Tensor:
        """The task's own loss."""
        return task_loss

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Nothing."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Nothing."""

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model as it is."""
        return model

    def report(self) -> dict[str, Any]:
        """How much was trained."""
        return {"trained": self.trained, "of": self.weights, "trained_fraction": self.trained / self.weights}

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""


@dataclass
class ClosedFormRecovery(Recovery):
    """A recovery that solves for better weights and trains nothing: `solve` is called once, in place of the loop.

    It gives no hooks of a step. Every weight that it changes comes from the statistics of one pass over the text.
    """

    unread: ClassVar[tuple[str, ...]] = (
        "epochs", "max_steps", "learning_rate", "warmup", "weight_decay", "temperature", "save_steps",
    )  # fmt: skip
    remedy: ClassVar[str] = "Try more data (--num-samples), or train instead: --recovery distil"

    def refusal(self, task: str) -> str | None:
        """Any text will do."""
        return None

    def solve(
        self, model: PreTrainedModel, context: RecoveryContext, batches: Sequence[Batch], store: HiddenStateStore
    ) -> None:
        """Make the model better, in place.

        Args:
            model: the student, in evaluation mode, on the device that it computes on.
            context: with the teacher, on the same device.
            batches: text without labels.
            store: where hidden states may wait.
        """
        raise NotImplementedError
