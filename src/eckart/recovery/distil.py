"""Distillation: the student learns the teacher's outputs, and its features in between.

Hinton, Vinyals and Dean 2015, arXiv 1503.02531, for logits; the recoveries below it are presets of the same sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from eckart.data.model_kind import head_problem
from eckart.errors import UsageError
from eckart.recovery.base import Recovery, RecoveryContext

SPAN = ("start_logits", "end_logits")
"""The predictions of a model that marks a span."""

NEVER = -1e9
"""Added to the logit of what cannot be: its probability is 0, its gradient no NaN."""

TERMS = ("logits", "sentence", "hidden", "attention", "embedding", "task")


@dataclass
class Distil(Recovery):
    """`loss = logits T^2 KL(p_t || p_s) + hidden MSE(H) + attention KL(A) + embedding MSE(E) + task CE`.

    A model without an output head, task "embedding", has no logits and no loss of its own: the first term is then
    `sentence (1 - cos(s_t, s_s))`, s the sentence embeddings, pooled as the folder says.

    Each name is a weight; a term of weight 0 is not computed. Every term is a mean over real tokens, padding left out.
    A student of fewer layers is compared with every `L_t / L_s`-th layer of its teacher.

    Attributes:
        temperature: T, that both logits are divided by; None for the recipe's.
        logits: weight of the logits; of a regression head their MSE.
        sentence: of the sentence embeddings, where they are what is learnt.
        hidden: of the hidden states after each layer.
        attention: of the attention maps.
        embedding: of the embeddings' output.
        task: of the task's own loss.
        attention_loss: "kl" or "mse".
    """

    name: ClassVar[str] = "distil"
    title: ClassVar[str] = "every weight on a weighted sum of the teacher's logits, features and the task"
    paper: ClassVar[str] = "Hinton, Vinyals and Dean 2015, arXiv 1503.02531"
    use: ClassVar[str] = "The original is there, which is the usual case. It is the default."
    needs_teacher: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-4

    temperature: float | None = None
    logits: float = 1.0
    sentence: float = 1.0
    hidden: float = 1.0
    attention: float = 0.0
    embedding: float = 0.0
    task: float = 0.0
    attention_loss: str = "kl"

    def __post_init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._problem: str | None = None
        self.check_choice(("kl", "mse"), "attention_loss")
        self.check_range("(0, inf)", "temperature")
        self._check_weights(TERMS)

    def _check_weights(self, names: Sequence[str]) -> None:
        """Refuse weights below 0, and a sum of nothing."""
        self.check_range("[0, inf)", *names)
        if not any(getattr(self, name) for name in names):
            raise UsageError(
                f"recovery {self.name}: no weight of {', '.join(names)} is above 0, so there is nothing to minimize: "
                f"--recovery-option {names[0]}=1"
            )

    def _terms_of_task(self) -> tuple[str, ...]:
        """The terms that the task knows."""
        context = getattr(self, "context", None)
        pooled = context is not None and context.task == "embedding"
        return tuple(name for name in TERMS if name != ("logits" if pooled else "sentence"))

    def refusal(self, task: str) -> str | None:
        """Without labels there is no loss of the task."""
        if task in ("embedding", "logits") and self.task:
            return f"the task's own loss has the weight {self.task:g}, and there is none: --recovery-option task=0"
        return None

    @property
    def needed_outputs(self) -> frozenset[str]:
        """Hidden states and attention maps, where their weight is not 0."""
        hidden = {"hidden_states"} if self.hidden or self.embedding else set()
        return frozenset(hidden | ({"attentions"} if self.attention else set()))

    def prepare(self, model: PreTrainedModel, context: RecoveryContext) -> None:
        """Check that the two models can be compared.

        Raises:
            UsageError: naming what differs, and which weight to set to 0.
        """
        super().prepare(model, context)
        self._sums, self._counts = {}, {}
        assert context.teacher is not None
        self._check_weights(self._terms_of_task())
        self._temperature = self.temperature or context.recipe.temperature
        self._problem = head_problem(model)
        mine, theirs = model.config.get_text_config(), context.teacher.config.get_text_config()
        checks = (
            ("hidden_size", self.hidden or self.embedding, "hidden=0 embedding=0"),
            ("num_attention_heads", self.attention, "attention=0"),
        )
        for key, weight, remedy in checks:
            here, there = getattr(mine, key, None), getattr(theirs, key, None)
            if weight and here != there:
                raise UsageError(
                    f"recovery {self.name}: {key} is {here} in the student and {there} in the teacher, so these "
                    f"features cannot be compared. Leave them out: --recovery-option {remedy}"
                )
        here, there = (getattr(config, "num_hidden_layers", None) for config in (mine, theirs))
        if (self.hidden or self.attention) and here is not None and there is not None and here > there:
            raise UsageError(
                f"recovery {self.name}: the student has {here} layers, the teacher {there}. Give a teacher that is at "
                "least as deep, or leave layers out: --recovery-option hidden=0 attention=0"
            )

    def active(self) -> tuple[str, ...]:
        """The terms of this step."""
        return tuple(name for name in self._terms_of_task() if getattr(self, name))

    def loss(self, outputs: Any, teacher_outputs: Any, batch: Mapping[str, Tensor], task_loss: Tensor) -> Tensor:
        """The weighted sum."""
        mask = batch.get("attention_mask")
        total = task_loss.new_zeros(())
        for name in self.active():
            if name == "logits":
                value = self._predictions(outputs, teacher_outputs, batch)
            elif name == "sentence":
                value = self._sentences(outputs, teacher_outputs, mask)
            elif name == "hidden":
                value = _of_sides(_layers_mse, "hidden_states", outputs, teacher_outputs, batch)
            elif name == "embedding":
                value = _of_sides(_first_mse, "hidden_states", outputs, teacher_outputs, batch)
            elif name == "attention":
                compare = _layers_attention_kl if self.attention_loss == "kl" else _layers_attention_mse
                value = _of_sides(compare, "attentions", outputs, teacher_outputs, batch)
            else:
                value = task_loss
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
            self._counts[name] = self._counts.get(name, 0) + 1
            total = total + getattr(self, name) * value
        return total

    def _sentences(self, mine: Any, theirs: Any, mask: Tensor | None) -> Tensor:
        """Mean of `1 - cos` of the two sentence embeddings."""
        assert self.context.pooling is not None
        pooled, wanted = self.context.pooling(mine, mask), self.context.pooling(theirs, mask)  # (B, d)
        return (1 - functional.cosine_similarity(pooled, wanted, dim=-1)).mean()

    def _predictions(self, mine: Any, theirs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The first term; of a model that marks a span, the mean over its start and its end."""
        mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
        if getattr(mine, "start_logits", None) is None:
            return self._logits(mine.logits, theirs.logits, mask)
        hidden = torch.zeros_like(mine.start_logits) if mask is None else (1 - mask.to(mine.start_logits)) * NEVER
        ends = [self._logits(getattr(mine, n) + hidden, getattr(theirs, n) + hidden, None) for n in SPAN]
        return torch.stack(ends).mean()

    def _logits(self, mine: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
        if "regression" in (self._problem, self.context.task):
            return functional.mse_loss(mine.float(), theirs.float())
        T = self._temperature
        if self._problem == "multi_label_classification":
            target = (theirs.float() / T).sigmoid()
            entropy = functional.binary_cross_entropy(target, target)
            return T * T * (functional.binary_cross_entropy_with_logits(mine.float() / T, target) - entropy)
        found = _kl((mine.float() / T).log_softmax(-1), (theirs.float() / T).log_softmax(-1))  # (B,) or (B, T)
        return T * T * (_mean(found, mask) if found.dim() == 2 else found.mean())

    def report(self) -> dict[str, Any]:
        """The weights, the temperature, and each term's mean over the training."""
        means = {name: self._sums[name] / self._counts[name] for name in self._sums}
        weights = {name: getattr(self, name) for name in self._terms_of_task()}
        return super().report() | {"weights": weights, "temperature": self._temperature, "mean_terms": means}

    def state(self) -> dict[str, Tensor]:
        """The sum of each term, and over how many batches."""
        pairs = {name: [self._sums[name], self._counts[name]] for name in self._sums}
        return super().state() | {
            f"term/{name}": torch.tensor(pair, dtype=torch.float64) for name, pair in pairs.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with these sums."""
        super().restore(state)
        for key in state:
            if key.startswith("term/"):
                total, count = state[key].tolist()
                name = key.removeprefix("term/")
                self._sums[name], self._counts[name] = total, int(count)


@dataclass
class NoachGoldberg(Distil):
    """First features, then the logits: Noach and Goldberg 2020, Compressing pre-trained language models by matrix
    decomposition.

    Attributes:
        first_stage: fraction of the steps that go to the features.
    """  # noqa: D205

    name: ClassVar[str] = "noach-goldberg"
    title: ClassVar[str] = "stage 1: hidden states of every layer; stage 2: the teacher's logits"
    paper: ClassVar[str] = "Noach and Goldberg 2020, AACL, 2020.aacl-main.88"
    use: ClassVar[str] = (
        "You want the two stages of the paper, features first and predictions after, on an encoder with a task."
    )

    embedding: float = 1.0
    first_stage: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("[0, 1]", "first_stage")

    def active(self) -> tuple[str, ...]:
        """Features until `first_stage` of the steps are made, then the outputs (and the task, if it has a weight)."""
        first = self.context.step < self.first_stage * self.context.total_steps
        of_stage = ("hidden", "attention", "embedding") if first else ("logits", "sentence", "task")
        return tuple(name for name in super().active() if name in of_stage)


@dataclass
class InterLayer(Distil):
    """ILKD of KnGPT2: embeddings, attention maps, hidden states and the task's own loss at once.

    Edalati et al. 2021, arXiv 2110.08152; Tahaei et al. 2021 for BERT.
    """

    name: ClassVar[str] = "ilkd"
    title: ClassVar[str] = "embeddings, attention maps and hidden states of the teacher, with the task's own loss"
    paper: ClassVar[str] = "Edalati et al. 2021, arXiv 2110.08152"
    use: ClassVar[str] = (
        "After --method kngpt2, whose paper it comes from; or where the depth of student and teacher is the "
        "same and attention maps matter."
    )

    logits: float = 0.0
    sentence: float = 0.0
    hidden: float = 1.0
    attention: float = 1.0
    embedding: float = 1.0
    task: float = 1.0


def _of_sides(compare: Any, what: str, mine: Any, theirs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """What is compared of a model, or the mean over the two sides of an encoder-decoder, each with its own padding."""
    mask = batch.get("attention_mask")
    if getattr(mine, what, None) is not None:
        return compare(getattr(mine, what), getattr(theirs, what), mask)
    sides = (("encoder", mask), ("decoder", batch.get("decoder_attention_mask")))
    found = [compare(getattr(mine, f"{side}_{what}"), getattr(theirs, f"{side}_{what}"), own) for side, own in sides]
    return torch.stack(found).mean()


def _layers_mse(mine: Any, theirs: Any, mask: Tensor | None) -> Tensor:
    return _layers(_mse, mine[1:], theirs[1:], mask)


def _first_mse(mine: Any, theirs: Any, mask: Tensor | None) -> Tensor:
    return _mse(mine[0], theirs[0], mask)


def _layers_attention_kl(mine: Any, theirs: Any, mask: Tensor | None) -> Tensor:
    return _layers(_attention_kl, mine, theirs, mask)


def _layers_attention_mse(mine: Any, theirs: Any, mask: Tensor | None) -> Tensor:
    return _layers(_attention_mse, mine, theirs, mask)


def _layers(compare: Any, mine: Any, theirs: Any, mask: Tensor | None) -> Tensor:
    """Mean over the student's layers; layer i of L_s is compared with layer `i L_t / L_s` (counted from 1)."""
    few, many = len(mine), len(theirs)
    values = [compare(mine[i], theirs[(i + 1) * many // few - 1], mask) for i in range(few)]
    return torch.stack(values).mean()


def _mse(mine: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens of the mean square over the width; (B, T, d)."""
    return _mean((mine.float() - theirs.float()).square().mean(-1), mask)


def _attention_kl(mine: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real queries of KL(teacher || student); maps (B, heads, T, T)."""
    tiny = 1e-9  # log of 0: masked keys, and keys that dropout has set to 0
    return _mean(_kl(mine.float().clamp_min(tiny).log(), theirs.float().clamp_min(tiny).log()).mean(1), mask)


def _attention_mse(mine: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    return _mean((mine.float() - theirs.float()).square().mean((1, 3)), mask)


def _kl(mine: Tensor, theirs: Tensor) -> Tensor:
    """KL(teacher || student) over the last axis, from log-probabilities."""
    return (theirs.exp() * (theirs - mine)).sum(-1)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (B, T) over real tokens."""
    if mask is None or mask.shape != values.shape:
        return values.mean()
    real = mask.to(values.dtype)
    return (values * real).sum() / real.sum().clamp_min(1)
