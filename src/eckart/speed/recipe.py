"""The recipe of a benchmark. It is read without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from eckart.config import RecipeBase

Dtype = Literal["float32", "bfloat16", "float16"]


class BenchRecipe(RecipeBase):
    """On what models are timed, and how. Options that are None take a default.

    The same names are the flags of `eckart bench` and the keyword arguments of :func:`eckart.bench`.
    """

    batch_sizes: tuple[int, ...] = Field((1, 32), description="How many texts run at a time.")
    lengths: tuple[int, ...] = Field((128,), description="Tokens of a text; of causal models, of the prompt.")
    dtype: Dtype | None = Field(None, description="Type to compute in. Default: what the first model is stored in.")
    decode: bool = Field(True, description="Causal models: also time one token after a prompt, with a key-value cache.")
    compile: bool = Field(False, description="Also time the models as torch.compile makes them.")
    baselines: bool = Field(True, description="Also time the models in bfloat16 and int8.")
    repeats: int = Field(7, ge=1, description="Turns of each model, at least.")
    seconds: float = Field(0.5, ge=0, description="Seconds that a model is timed for, at least, at every size.")
    clock: Literal["wall", "processor"] = Field(
        "wall",
        description="Seconds that pass; or that the processor works for this process, which a busy machine changes "
        "little: for one thread.",
    )
    revision: str | None = Field(None, description="Revision of the models on the hub. Default: main.")
    trust_remote_code: bool = Field(False, description="Allow the models' own Python code to run.")
    device: str = Field("auto", description="Device to compute on: cpu, cuda, cuda:1; auto: a GPU where there is one.")

    @field_validator("batch_sizes", "lengths", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """One number, a list, or words with commas between them, as the command line has them."""
        values = [value] if isinstance(value, int | str) else value
        if not isinstance(values, list | tuple):
            return value
        return tuple(part for one in values for part in (one.split(",") if isinstance(one, str) else [one]))

    @field_validator("batch_sizes", "lengths")
    @classmethod
    def _positive(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values or min(values) < 1:
            raise ValueError("must be whole numbers of 1 or more, such as 1,32")
        return tuple(dict.fromkeys(values))
