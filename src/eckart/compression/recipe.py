"""The recipe of a compression: everything that can be chosen, in one object that is saved with the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from eckart.compression.effort import Effort
from eckart.config import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_TEXTS,
    DEFAULT_TOKENS,
    DEFAULT_WINDOWS,
    DISTILLED,
    REFINED,
    STRICT,
    QuantizationKind,
    RecipeBase,
)
from eckart.methods import Method
from eckart.registry import EMBEDDINGS, FORMS, METHODS, RECOVERIES

DENSE = "dense"

PLANNED = ("keep", "keep_of", "form", "layers_per_basis", "allocation", "rank_multiple", "objective", "optimise")
"""Fields that say what a plan says already."""


class Recipe(RecipeBase):
    """What a compression does. Options that are None take the method's setting or a default.

    The same names are the command line's flags (`--max-seq-length`), the keys of `--config run.yaml`
    and the keyword arguments of :func:`eckart.compress`.
    """

    renamed: ClassVar[Mapping[str, str]] = {"share": "layers_per_basis"}
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {"embeddings": {"keep": DENSE}}

    model: str | None = Field(None, description="Hub name or folder of the model to compress.")
    revision: str | None = Field(None, description="Revision of the model on the hub. Default: main.")
    method: str = Field("eckart", description="A method by name; `eckart methods` lists them.")
    metric: str | None = Field(
        None, description="Another method's metric in place of this one's. Default: the method's."
    )
    form: str | None = Field(
        None, description=f"How a factored weight is stored: {', '.join(FORMS)}. Default: the method's form."
    )
    layers_per_basis: int | None = Field(
        None, ge=1, description="Adjacent layers whose weights share a basis, in form shared-basis. Default: 2."
    )
    allocation: Literal["uniform", "loss"] | None = Field(
        None,
        description="How ranks are chosen: the same fraction of every weight, or by the predicted loss. "
        "Default: the method's.",
    )
    effort: Effort = Field(
        "default",
        description="Which stages follow the statistics and the factors. fast: none. default: those of the method. "
        "best: the refit and the distillation or, where that cannot be, the refinement, about ten times the work. "
        "Options of single stages come first.",
    )
    refit: bool | None = Field(
        None,
        description="Fit every factored weight again on the inputs that the compressed model gives it. "
        "Default: the method's.",
    )
    refine: bool | None = Field(
        None,
        description="Train the blocks of the smaller model one after another to put out what the original's do. "
        "Takes up to ten times as long as gathering the statistics. Default: the method's.",
    )
    distil: bool | None = Field(
        None,
        description="Train all blocks of the smaller model together to predict each token as the original does. Takes "
        "up to ten times as long as gathering the statistics, and the whole model in memory, with the optimizer. "
        "Default: the method's.",
    )
    refine_samples: int | None = Field(
        None,
        ge=1,
        description="Windows or texts that refinement and distillation read, those of the calibration among them; of "
        f"more text they make fewer passes. Default: {REFINED} and {DISTILLED} times --num-samples, as far as the data "
        "goes.",
    )
    calibrate_curves: bool | None = Field(
        None,
        description="Scale the predicted losses by what cutting each weight alone does to the output of the whole "
        "model, before ranks are chosen. Default: the method's.",
    )
    robust_gradients: bool | None = Field(
        None,
        description="Clip each token's gradient to .1 to 10 times the mean norm of its sequence, and leave out the "
        "first and the last eighth of each sequence. Default: the method's.",
    )
    rounds: int = Field(
        1,
        ge=1,
        le=8,
        description="Make so many models, each smaller than the one before; ranks are chosen by the statistics of the "
        "one before. Each takes the time of gathering them.",
    )
    keep: float = Field(0.7, gt=0, le=1, description="Fraction of the numbers that is stored afterwards.")
    keep_of: Literal["sites", "reached", "model"] = Field(
        "sites",
        description="What `keep` is a fraction of: the weights that can be factored, those of them that the data "
        "reaches, or the whole model.",
    )
    embeddings: str = Field(
        DENSE,
        description="How token embeddings, and output heads tied to them, are stored: "
        f"{', '.join((DENSE, *EMBEDDINGS))}. safe needs `eckart tune` afterwards.",
    )
    embeddings_keep: float = Field(
        0.5, gt=0, le=1, description="Fraction of the numbers of the token embeddings that is stored afterwards."
    )
    optimise: Literal["speed", "size"] = Field(
        "speed",
        description="What the default form is chosen for: speed on the target, or the fewest stored numbers.",
    )
    target: Literal["auto", "cpu", "cuda", "none"] = Field(
        "auto",
        description="Where the model will run: ranks are multiples of what it computes fast; none: the exact sizes of "
        "the papers; auto: the device of this run.",
    )
    rank_multiple: int | None = Field(
        None, ge=1, description="Ranks are multiples of this. Default: what the target computes fast."
    )
    objective: Literal["size", "latency"] = Field(
        "size",
        description="What ranks and forms are paid for: stored numbers, or seconds that are measured on this machine.",
    )
    speedup: float | None = Field(
        None, gt=1, description="Ask for a speed instead of a size: so many times as fast as the dense model."
    )
    max_loss: str | None = Field(
        None,
        description="Ask for a quality instead of a size: the most that may be lost on held-out data, such as 1%; the "
        "smallest size that keeps to it is searched.",
    )
    latency_batch_size: int = Field(32, ge=1, description="Texts at a time that seconds are measured for.")
    latency_length: int = Field(128, ge=1, description="Tokens of each of these texts.")
    profile: str | None = Field(
        None, description="A file of measured seconds; it is read if it is there, and written if not."
    )
    stock: bool = Field(
        False,
        description="In form sliced: one size for all layers, so that transformers alone loads the result.",
    )
    quantize: QuantizationKind | None = Field(
        None,
        description="Then round the weights to few bits, factors and what stayed dense; int8-dynamic: inputs too. "
        "Needs torchao.",
    )
    latency: bool | None = Field(
        None,
        description="Also time a forward pass of the original and the result, in turn, for report and card. Default: "
        "when methods are compared.",
    )
    plan: str | None = Field(None, description="A plan.json: its forms and ranks are used, and none are chosen.")
    targets: tuple[str, ...] | None = Field(
        None, description="Factor only these modules: names, globs or regexes. Default: all that can be."
    )
    ignore: tuple[str, ...] | None = Field(
        None, description="Do not factor these modules: names, globs or regexes. Default: none."
    )
    data: str | None = Field(
        None,
        description="Calibration text: a file, a folder, a hub data set, 'stdlib' (Python's standard library), or "
        "'self' (text that the model writes). Default: WikiText-2.",
    )
    data_config: str | None = Field(None, description="Configuration of the hub data set. Default: its own.")
    data_split: str = Field("train", description="Split of the hub data set.")
    data_column: str | None = Field(
        None, description="Column that holds the text; a number for files without header. Default: found by its name."
    )
    data_target_column: str | None = Field(
        None,
        description="Second column: of a sentence pair, or the target of an encoder-decoder. "
        "Default: found by its name.",
    )
    data_label_column: str | None = Field(None, description="Column that holds the task's own labels. Default: none.")
    data_revision: str | None = Field(None, description="Revision of the hub data set. Default: main.")
    num_samples: int | None = Field(
        None,
        ge=1,
        description="Windows or texts to calibrate on. "
        f"Default: {DEFAULT_WINDOWS} windows for causal models, {DEFAULT_TEXTS:,} texts for others.",
    )
    max_seq_length: int | None = Field(
        None,
        ge=2,
        description=f"Tokens of a window or text. Default: {DEFAULT_TOKENS}, or the model's positions if fewer.",
    )
    batch_size: int | None = Field(
        None, ge=1, description=f"Windows or texts that run at a time. Default: {DEFAULT_BATCH_SIZE}."
    )
    curvature: Literal["auto", "sampled", "labels"] = Field(
        "auto",
        description="Targets of the loss whose gradients are measured: sampled from the model's own outputs, or the "
        "task's labels; auto: labels where the data has them.",
    )
    seed: int = Field(0, ge=0, description="Seed of every random draw.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Type of the stored numbers. Default: the model's."
    )
    device: str = Field("auto", description="Device to compute on: cpu, cuda, cuda:1; auto: a GPU where there is one.")
    stream: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Work block by block, in memory that does not grow with the model's depth, and resume an "
        "interrupted run; auto: where the whole model is too large for memory.",
    )
    cache_memory: float | None = Field(
        None,
        ge=0,
        description="GB of hidden states kept in memory between blocks; the rest is kept in files. Default: 0.5.",
    )
    trust_remote_code: bool = Field(False, description="Allow the model's own Python code to run.")
    strict: bool = Field(False, description=STRICT)

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value or None

    @field_validator("method", "metric", mode="before")
    @classmethod
    def _own_method(cls, value: Any) -> Any:
        """A :class:`eckart.Method` of one's own is registered, and the recipe holds its name."""
        return METHODS.add(value.name, value).name if isinstance(value, Method) else value

    @field_validator("form", "embeddings", mode="before")
    @classmethod
    def _own_form(cls, value: Any) -> Any:
        """A form of one's own likewise."""
        if not isinstance(value, type):
            return value
        from eckart.forms import register_form

        return register_form(value)

    @field_validator("method", "metric")
    @classmethod
    def _known_method(cls, value: str | None) -> str | None:
        if value is not None and value in RECOVERIES and value not in METHODS:
            raise ValueError(_name_recovery(value))
        return value if value is None else METHODS.check(value)

    @field_validator("form")
    @classmethod
    def _known_form(cls, value: str | None) -> str | None:
        return value if value is None else FORMS.check(value)

    @field_validator("embeddings")
    @classmethod
    def _known_embeddings(cls, value: str) -> str:
        return value if value == DENSE else EMBEDDINGS.check(value)

    @model_validator(mode="after")
    def _embeddings_have_a_form(self) -> Recipe:
        if self.embeddings == DENSE and "embeddings_keep" in self.model_fields_set:
            raise ValueError(
                f"embeddings_keep = {self.embeddings_keep:g}: the embeddings are stored dense, as they are. Name a "
                f"form for them: --embeddings {', '.join(EMBEDDINGS)}"
            )
        return self

    @classmethod
    def combine(cls, content: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Options win over a file; a plan among them wins over all of the file that a plan says."""
        replaced = PLANNED if options.get("plan") is not None else ()
        return {**{name: value for name, value in content.items() if name not in replaced}, **options}

    @model_validator(mode="after")
    def _plan_says_it_all(self) -> Recipe:
        fields = type(self).model_fields
        given = [
            name for name in PLANNED
            if name in self.model_fields_set and (name == "keep" or getattr(self, name) != fields[name].default)
        ]  # fmt: skip
        if self.plan is not None and given:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            verb = "says" if len(given) == 1 else "say"
            raise ValueError(
                f"--plan and {flags}: the plan names form and rank of every weight, so {flags} {verb} nothing. Leave "
                "one of them out, or edit the plan."
            )
        return self

    @model_validator(mode="after")
    def _stock_has_ordinary_numbers(self) -> Recipe:
        if self.stock and self.quantize is not None:
            raise ValueError(
                f"--stock and --quantize {self.quantize}: transformers alone loads no layers that eckart has rounded. "
                f"Leave --quantize out, then: eckart export DIR --format dense --quantize {self.quantize}"
            )
        return self

    @model_validator(mode="after")
    def _rounds_have_sizes(self) -> Recipe:
        goals = [name for name in ("plan", "speedup", "max_loss") if getattr(self, name) is not None]
        if self.rounds > 1 and goals:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in goals)
            raise ValueError(f"--rounds {self.rounds} and {flags}: rounds go down to a size. Ask for --keep.")
        return self

    @model_validator(mode="after")
    def _one_goal(self) -> Recipe:
        goals = [name for name in ("plan", "speedup", "max_loss") if getattr(self, name) is not None]
        if "keep" in self.model_fields_set and goals:
            goals.insert(0, "keep")
        if len(goals) > 1:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in goals)
            raise ValueError(f"{flags} each say how large the model becomes: give one of them.")
        if self.profile is not None and not self.weighs_seconds:
            raise ValueError(
                f"--profile {self.profile}: no seconds are weighed. Add --objective latency or --speedup, or remove it."
            )
        return self

    @property
    def weighs_seconds(self) -> bool:
        """Whether forms and ranks are chosen by measured seconds."""
        return self.objective == "latency" or self.speedup is not None

    def to_yaml(self) -> str:
        """The recipe as it is saved with the model, without the options that this run did not read."""
        paper = self.plan is None and self.allocation is None and METHODS[self.method].allocation == "paper"
        searched = self.speedup is not None or self.max_loss is not None
        unread = (("keep", "keep_of") if paper or searched else ()) + (
            ("embeddings_keep",) if self.embeddings == DENSE else ()
        )
        unread += PLANNED if self.plan is not None else ()
        return self._yaml_without(unread)


def _name_recovery(name: str) -> str:
    """The command of a recovery that was taken for a method."""
    about = RECOVERIES.about(name)
    teacher = " --teacher MODEL" if about.get("needs_teacher") else ""
    command = f"eckart tune DIR --recovery {name}{teacher} --data FILE --output-dir OUT"
    if name == "refit":
        return f"{name} recovers what a method has lost: {command}; while factors are made, any method with --{name}"
    return f"{name} is trained: {command}"
