"""The recipes of an evaluation and of an inspection. They are read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from eckart.config import QuantizationKind, RecipeBase

Task = Literal["perplexity", "classification", "regression", "similarity", "agreement", "embedding"]
TASKS: tuple[str, ...] = get_args(Task)
HARNESS = {"limit", "num_fewshot", "include_path", "apply_chat_template"}
OWN_DATA = {"task", "data", "data_config", "data_split", "data_column", "data_target_column", "data_label_column",
            "data_revision", "num_samples", "max_tokens"}  # fmt: skip


class EvaluationRecipe(RecipeBase):
    """On what a model is scored, and how. Options that are None take a default.

    The same names are the flags of `eckart eval` and the keyword arguments of :func:`eckart.evaluate`.
    """

    renamed: ClassVar[Mapping[str, str]] = {"window": "max_seq_length"}

    task: Task | None = Field(None, description="What is scored. Default: what fits the model and the data.")
    data: str | None = Field(
        None,
        description="Text or labeled rows: a file, a folder, a hub data set, or 'stdlib' (the source of Python's "
        "library). Default: WikiText-2.",
    )
    data_config: str | None = Field(None, description="Configuration of the hub data set. Default: its own.")
    data_split: str | None = Field(
        None, description="Split of the hub data set. Default: test, and of 'stdlib' the held-out modules."
    )
    data_column: str | None = Field(
        None, description="Column that holds the text; a number for files without header. Default: found by its name."
    )
    data_target_column: str | None = Field(
        None,
        description="Second column: of a sentence pair, or the target of an encoder-decoder. "
        "Default: found by its name.",
    )
    data_label_column: str | None = Field(
        None, description="Column that holds the label or score. Default: found by its name."
    )
    data_revision: str | None = Field(None, description="Revision of the hub data set. Default: main.")
    num_samples: int | None = Field(
        None,
        ge=1,
        description="Rows, windows or texts to score. "
        "Default: all rows; for distances to the original 128 windows or 1,024 texts.",
    )
    max_seq_length: int | None = Field(
        None,
        ge=2,
        description="Tokens of a window or text. "
        "Default: 1,024 for perplexity, else 512, or the model's positions if fewer.",
    )
    max_tokens: int | None = Field(None, ge=1, description="Score only this many tokens of running text. Default: all.")
    batch_size: int | None = Field(
        None, ge=1, description="Windows or texts that run at a time. Default: 8, of labeled rows 32."
    )
    lm_eval: str | None = Field(
        None, description="Tasks of lm_eval to score instead, as its --tasks: names with commas between, or files."
    )
    limit: float | None = Field(
        None, gt=0, description="With --lm-eval: rows of each task to score; below 1, which part of them."
    )
    num_fewshot: int | None = Field(None, ge=0, description="With --lm-eval: examples that the prompt holds.")
    include_path: str | None = Field(None, description="With --lm-eval: folder with tasks of your own.")
    apply_chat_template: bool = Field(False, description="With --lm-eval: write the prompts as a chat.")
    quantize: QuantizationKind | None = Field(
        None,
        description="Score and time the models with weights in few bits too; int8-dynamic: inputs as well. Needs "
        "torchao.",
    )
    baselines: bool = Field(
        True, description="Score the original rounded to int8 and int4 as well, and a factored model rounded to int8."
    )
    latency: bool = Field(True, description="Also time a forward pass of each model, all in turn.")
    revision: str | None = Field(None, description="Revision of the models on the hub. Default: main.")
    trust_remote_code: bool = Field(False, description="Allow the models' own Python code to run.")
    device: str = Field("auto", description="Device to compute on: cpu, cuda, cuda:1; auto: a GPU where there is one.")

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        given = [name for name in self.model_fields_set if getattr(self, name) not in (None, False)]
        others = sorted(set(given) & (OWN_DATA if self.lm_eval is not None else HARNESS))
        if others and self.lm_eval is not None:
            raise ValueError(f"lm_eval: its tasks bring their own data, and {', '.join(others)} is of no use to them")
        if others:
            raise ValueError(f"{', '.join(others)}: only tasks of lm_eval have it; name them with lm_eval")
        return self


class InspectionRecipe(RecipeBase):
    """Which weights of a model are looked at. Options that are None take a default.

    The same names are the flags of `eckart inspect` and the keyword arguments of :func:`eckart.inspect`.
    """

    model: str | None = Field(None, description="Hub name or folder of the model.")
    targets: tuple[str, ...] | None = Field(
        None, description="Only these modules: names, globs or regular expressions. Default: all that can be factored."
    )
    ignore: tuple[str, ...] | None = Field(None, description="Leave these modules out. Default: none.")
    revision: str | None = Field(None, description="Revision of the model on the hub. Default: main.")
    trust_remote_code: bool = Field(False, description="Allow the model's own Python code to run.")
    device: str = Field("auto", description="Device to compute on: cpu, cuda, cuda:1; auto: a GPU where there is one.")

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value or None
