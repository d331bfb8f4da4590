"""Steps of a training: transformers' Trainer, with a recovery's hooks, and a journal to go on from.

Trainer keeps the states of optimizer, scheduler and random numbers in pickles. Here they are tensors and JSON in the
journal of the output folder, so that nothing pickled is written or read.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from eckart.config import resolve_device
from eckart.errors import NumericalError
from eckart.recovery.base import Recovery, RecoveryContext
from eckart.recovery.training.examples import Examples
from eckart.recovery.training.masking import mask_tokens
from eckart.recovery.training.sampling import ByLength
from eckart.storage.journal import Journal

STATE = "state"


def train(
    model: PreTrainedModel,
    recovery: Recovery,
    context: RecoveryContext,
    examples: Examples,
    tokenizer: Any,
    journal: Journal | None,
    *,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train a prepared model in place.

    Args:
        model: the student, prepared by the recovery.
        recovery: its hooks.
        context: shared with the recovery.
        examples: what is trained on.
        tokenizer: names the mask token.
        journal: keeps the state every `save_steps` steps; a training that it holds is gone on with.
        stop_after: break off after this step, as if killed.

    Returns:
        `steps`, `resumed_from`, `first_loss` and `last_loss`: means over the first and last tenth of the steps.

    Raises:
        NumericalError: the loss is not finite.
    """
    recipe = context.recipe
    rate = recipe.learning_rate or recovery.learning_rate
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=context.total_steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=rate,
            weight_decay=recipe.weight_decay,
            warmup_steps=round(recipe.warmup * context.total_steps),
            lr_scheduler_type="linear",
            save_strategy="steps" if journal is not None else "no",
            save_steps=recipe.save_steps,
            logging_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            seed=recipe.seed,
            use_cpu=resolve_device(recipe.device).type != "cuda",
            disable_tqdm=True,
        )
        trainer = _Trainer(model, arguments, recovery, context, examples, tokenizer, journal, stop_after)
        saved = trainer.saved()
        if saved is not None:
            _, content = saved
            (Path(folder) / "trainer_state.json").write_text(json.dumps(content["trainer"]), encoding="utf-8")
        trainer.train(resume_from_checkpoint=folder if saved is not None else None)
    tenth = max(1, len(trainer.losses) // 10)
    return {
        "steps": trainer.state.global_step,
        "learning_rate": rate,
        "resumed_from": saved[1]["step"] if saved is not None else 0,
        "first_loss": sum(trainer.losses[:tenth]) / tenth,
        "last_loss": sum(trainer.losses[-tenth:]) / tenth,
    }


class _Trainer(Trainer):
    """Trainer with a recovery's hooks, a teacher, and a journal in place of pickles."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        recovery: Recovery,
        context: RecoveryContext,
        examples: Examples,
        tokenizer: Any,
        journal: Journal | None,
        stop_after: int | None,
    ) -> None:
        super().__init__(
            model=model, args=arguments, train_dataset=examples.rows, data_collator=examples.collate,
        )  # fmt: skip
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(_Hooks(self))
        self.student = model
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        self.recovery, self.context, self.reader, self.journal = recovery, context, tokenizer, journal
        self.stop_after = stop_after
        self.losses: list[float] = []
        self.lengths = [len(row["input_ids"]) for row in examples.rows]
        teacher = context.teacher
        if teacher is not None:
            teacher.to(arguments.device)  # type: ignore[arg-type]
            teacher.eval()

    def _get_train_sampler(self, train_dataset: Any = None) -> ByLength:
        return ByLength(self.lengths, self.args.per_device_train_batch_size, self.args.seed)

    # -- a step --------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The recovery's loss on a batch."""
        self.context.step = self.state.global_step
        batch = dict(inputs)
        if self.context.task == "masked":
            seed = self.args.seed * 1_000_003 + self.state.global_step  # a step masks alike when it is done again
            batch = mask_tokens(batch, self.reader, int(model.config.vocab_size), seed)
        more = {f"output_{name}": True for name in self.recovery.wants}
        outputs = model(**batch, **more)
        theirs = None
        if self.recovery.needs_teacher and self.context.teacher is not None:
            with torch.no_grad():
                theirs = self.context.teacher(**{k: v for k, v in batch.items() if k != "labels"}, **more)
        own = getattr(outputs, "loss", None)  # a model without a head has none
        own = own if own is not None else torch.zeros((), device=self.args.device)
        loss = self.recovery.loss(outputs, theirs, batch, own)
        if not bool(torch.isfinite(loss)):
            raise NumericalError(
                f"The loss of step {self.state.global_step + 1} is {float(loss)}. Lower --learning-rate, or check the "
                "data and the teacher."
            )
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, *args: Any, **more: Any) -> Tensor:
        """Forward, backward, and the recovery's look at the gradients."""
        loss = super().training_step(model, *args, **more)
        self.losses.append(float(loss))
        self.recovery.after_backward(self.student, self.state.global_step)
        return loss

    # -- what is kept --------------------------------------------------------------------------------

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last state that the journal holds."""
        names = self.journal.entries(STATE) if self.journal is not None else []
        return self.journal.read(STATE, names[-1]) if self.journal is not None and names else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.journal is not None
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        tensors = {f"model/{name}": value for name, value in _tensors(self.student)}
        tensors |= {f"recovery/{name}": value for name, value in self.recovery.state().items()}
        optimizer = self.optimizer.state_dict()
        scalars: dict[str, dict[str, Any]] = {}
        for number, entry in optimizer["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{number}/{key}"] = value
                else:
                    scalars.setdefault(str(number), {})[key] = value
        tensors["random/torch"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        kind, keys, *rest = np.random.get_state()
        content = {
            "step": self.state.global_step,
            "losses": self.losses,
            "groups": optimizer["param_groups"],
            "scalars": scalars,
            "scheduler": self.lr_scheduler.state_dict(),
            "random": {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]},
            "trainer": _plain(self.state),
        }
        plain = json.loads(json.dumps(content))
        self.journal.write(STATE, f"step {self.state.global_step}", tensors, plain, supersedes=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = self.saved()
        assert saved is not None
        tensors, content = saved
        self.losses = list(content["losses"])
        with torch.no_grad():
            for name, value in _tensors(self.student):
                value.copy_(tensors[f"model/{name}"])
        self.recovery.restore(_under(tensors, "recovery/"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        saved = self.saved() if checkpoint is not None else None
        if saved is None:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        tensors, content = saved
        state: dict[int, dict[str, Any]] = {int(n): dict(entry) for n, entry in content["scalars"].items()}
        for name, value in _under(tensors, "optimizer/").items():
            number, _, key = name.partition("/")
            state.setdefault(int(number), {})[key] = value.clone()
        groups = [
            {key: tuple(value) if key == "betas" else value for key, value in group.items()}
            for group in content["groups"]
        ]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.lr_scheduler.load_state_dict(content["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        saved = self.saved() if checkpoint is not None else None
        if saved is None:
            return
        tensors, content = saved
        version, numbers, gauss = content["random"]["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = content["random"]["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(tensors["random/torch"].clone())
        if torch.cuda.is_available() and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"].clone())


class _Hooks(TrainerCallback):
    """The recovery after each step, and a bar."""

    def __init__(self, trainer: _Trainer) -> None:
        self.trainer = trainer
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the bar, where somebody looks."""
        disable = None if sys.stderr is not None else True
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", disable=disable,
                        leave=False, name="eckart")  # fmt: skip

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The optimizer has stepped."""
        self.trainer.recovery.after_step(self.trainer.student, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step is done."""
        self.bar.set_postfix(loss=f"{self.trainer.losses[-1]:.4g}", refresh=False)
        self.bar.update()
        if self.trainer.stop_after is not None and state.global_step >= self.trainer.stop_after:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the bar away."""
        self.bar.close()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer, tied ones once."""
    return [*((n, p.detach()) for n, p in model.named_parameters()), *model.named_buffers()]


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _plain(state: Any) -> dict[str, Any]:
    """Trainer's own state as it would write it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trainer_state.json"
        state.save_to_json(str(path))
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
