"""The base classes of recoveries: what the training loop calls, and when.

A recovery is one file with one dataclass on :class:`Recovery`, and one line in `eckart.registry.RECOVERIES`. Its
settings are the fields of the dataclass: `LoRA(rank=8)` in Python, `--recovery lora --recovery-option rank=8` on the
command line.
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
from eckart.storage.store import EntryStore


@dataclass
class RecoveryContext:
    """The tuning that a recovery takes part in.

    Attributes:
        teacher: the model to learn from, in evaluation mode; None where there is none.
        task: "classification", "regression", "masked", "causal", "embedding" or "logits".
        recipe: the options.
        total_steps: optimizer steps of the whole training.
        output_head: modules that are always trained: a classifier's output head, and what is newly initialized.
        notes: for the report: what could not be done as asked.
        step: the current optimizer step, from 0; the training loop sets it.
        pooling: how tokens become the sentence embedding, in task "embedding".
        held_out: what the models are scored on, for a recovery in closed form that reads labels, of tasks with one
            answer a text.
        journal: keeps what is done of a result that is published, so that an interrupted run can go on; else None.
    """

    teacher: PreTrainedModel | None
    task: str
    recipe: Any
    total_steps: int
    output_head: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    step: int = 0
    pooling: Pooling | None = None
    journal: EntryStore | None = None
    held_out: Sequence[Batch] = ()

    def in_output_head(self, name: str) -> bool:
        """Whether a parameter belongs to the output head."""
        return any(name.startswith(f"{head}.") for head in self.output_head)


@dataclass
class Recovery:
    """Trains every weight on the task's own loss; a subclass overrides what it does differently.

    The order of the calls: `prepare` once; in each step `loss` for each batch, `after_backward` once all gradients are
    there, `after_step` once the optimizer has changed the weights; `finish` once. What must survive an interruption and
    is not a weight or buffer of the model goes through `state` and `restore`.

    Class attributes:
        name: as `--recovery` takes it.
        title: one line for tables.
        paper: authors, year, identifier; "" for common knowledge.
        use: when to take it, in words, for its page in the documentation.
        needs_teacher: whether there must be a teacher.
        students: which models it takes: "any", "encoder" (every token sees all others) or "classifier" (an encoder with
            one answer a text).
        own_teacher: whether the model as it is becomes the teacher where none is named.
        learning_rate: where none is asked for.
        needs_dense_model: whether the model must not be factored yet.
        keeps_behaviors: behaviors of :mod:`eckart.adaptive` that a model may have that it is given.
        unused_options: options of the recipe that mean nothing to it: refused where they are given.
        why_unused: what it does instead, in words.
        remedy: what to try where the model did not get better.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    use: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = False
    students: ClassVar[str] = "any"
    own_teacher: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 5e-5
    needs_dense_model: ClassVar[bool] = False
    keeps_behaviors: ClassVar[tuple[str, ...]] = ()
    unused_options: ClassVar[tuple[str, ...]] = ()
    why_unused: ClassVar[str] = "is in closed form, it has no steps and no learning rate"
    remedy: ClassVar[str] = "Try a lower --learning-rate, more data, or fewer --epochs"

    def refusal(self, task: str) -> str | None:
        """Why this recovery cannot learn a task, or None where it can."""
        none = task in ("embedding", "logits")
        return "it learns from the task's own loss, and there is none" if none else None

    def check_range(self, interval: str, *keys: str) -> None:
        """Check settings that are numbers.

        Args:
            interval: as mathematics writes it: "[0, 1)" is 0 and more, and less than 1; "[1, inf)" is 1 and more.
            keys: names of the settings; None is not a number, and passes.

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

    def check_choice(self, known: Collection[str], key: str) -> None:
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
    def needed_outputs(self) -> frozenset[str]:
        """Outputs of the models beside the logits that `loss` reads: "hidden_states", "attentions"."""
        return frozenset()

    @property
    def shrinks(self) -> bool:
        """Whether the model becomes smaller; a smaller model is published whatever it scores."""
        return False

    def prepare(self, model: PreTrainedModel, context: RecoveryContext) -> None:
        """Change the model for training, in place: on the CPU, every weight with `requires_grad`."""
        self.context = context
        self.count(model)

    def count(self, model: nn.Module) -> None:
        """Count all numbers of the weights and those that are trained, for the report."""
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.weights = sum(p.numel() for p in model.parameters())

    def loss(self, outputs: Any, teacher_outputs: Any, batch: Mapping[str, Tensor], task_loss: Tensor) -> Tensor:
        """What is minimized, a mean over the batch.

        Args:
            outputs: of the student.
            teacher_outputs: without gradients; None where there is no teacher.
            batch: input_ids, attention_mask (B, T) and what else the model reads.
            task_loss: the task's own loss; 0 where the task has none.
        """
        return task_loss

    def after_backward(self, model: nn.Module, step: int) -> None:
        """All gradients of a step are there, not clipped yet."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """The optimizer has made a step, counted from 0."""

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """The trained model as it is to be published, on the CPU."""
        return model

    def report(self) -> dict[str, Any]:
        """What was done, as JSON values."""
        return {"trained": self.trained, "of": self.weights, "trained_fraction": self.trained / self.weights}

    def state(self) -> dict[str, Tensor]:
        """What a training that resumes needs beside the model's own parameters and buffers."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave, after `prepare`."""


@dataclass
class ClosedFormRecovery(Recovery):
    """Makes the model better by itself: `solve` is called once, in place of the training loop.

    Most solve for weights in closed form, from the statistics of one pass over the text.

    Class attributes:
        reads_labels: whether the batches have labels, where the data have.
        most_rows: that are read where no number is asked for; None for as many as calibration takes.
    """

    reads_labels: ClassVar[bool] = False
    most_rows: ClassVar[int | None] = None

    unused_options: ClassVar[tuple[str, ...]] = (
        "epochs", "max_steps", "learning_rate", "warmup", "weight_decay", "temperature", "save_steps",
        "gradient_accumulation", "gradient_checkpointing", "bf16",
    )  # fmt: skip
    remedy: ClassVar[str] = "Try more data (--num-samples), or train instead: --recovery distil"

    def refusal(self, task: str) -> str | None:
        """Text of any task will do."""
        return None

    def solve(
        self, model: PreTrainedModel, context: RecoveryContext, batches: Sequence[Batch], store: HiddenStateStore
    ) -> None:
        """Make the model better, in place.

        Args:
            model: the student, in evaluation mode, on the device that it computes on.
            context: with the teacher, on the same device.
            batches: text without labels.
            store: keeps hidden states between two blocks.
        """
        raise NotImplementedError
