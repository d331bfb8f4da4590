"""The recipe of a recovery by training: everything that was asked for, saved with the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from eckart.config import RecipeBase, check_recipe
from eckart.errors import UsageError
from eckart.recovery.options import make_recovery, recovery_named

if TYPE_CHECKING:
    from eckart.recovery.base import Recovery


class TuneRecipe(RecipeBase):
    """What a training is asked to do. Options that are None take the recovery's setting or a default.

    The same names are the command line's flags, the keys of `--config run.yaml` and the keyword arguments of
    :func:`eckart.tune`.
    """

    renamed: ClassVar[Mapping[str, str]] = {"method": "recovery"}

    model: str | None = Field(None, description="Folder of the model to train, factored or dense.")
    teacher: str | None = Field(None, description="Folder or hub name of the model to learn from.")
    recovery: str = Field("distil", description="A way of recovering by name; `eckart methods` lists them.")
    recovery_option: tuple[str, ...] = Field((), description="A setting of the recovery: name=value, such as rank=8.")
    task: Literal["auto", "classification", "regression", "masked", "causal", "embedding"] = Field(
        "auto",
        description="What is learnt; auto: what fits the model's head and the data's columns. embedding: the teacher's "
        "sentence embeddings, for a model without a head.",
    )
    data: str | None = Field(None, description="Text or labeled rows: a file, a folder, a hub data set, or 'stdlib'.")
    data_config: str | None = Field(None, description="Configuration of the hub data set.")
    data_split: str = Field("train", description="Split of the hub data set.")
    data_column: str | None = Field(None, description="Column that holds the text; a number for files without header.")
    data_pair_column: str | None = Field(None, description="Column that holds the second text of a pair.")
    data_label_column: str | None = Field(None, description="Column that holds the label or score.")
    data_revision: str | None = Field(None, description="Revision of the hub data set.")
    eval_data: str | None = Field(
        None, description="What the model is scored on before and after; default: a tenth of the data, held out."
    )
    eval_split: str = Field("validation", description="Split of the hub data set that --eval-data names.")
    eval_samples: int | None = Field(None, ge=1, description="Score only so many rows or windows.")
    num_samples: int | None = Field(None, ge=1, description="Train on only so many rows or windows.")
    epochs: float = Field(3.0, gt=0, description="How often the data are gone through.")
    max_steps: int | None = Field(None, ge=1, description="Steps of the optimizer, in place of epochs.")
    learning_rate: float | None = Field(None, gt=0, description="Highest learning rate. Default: the recovery's.")
    batch_size: int = Field(16, ge=1, description="Rows or windows a step.")
    max_seq_length: int | None = Field(None, ge=2, description="Tokens of a row or window.")
    warmup: float = Field(0.06, ge=0, lt=1, description="Fraction of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.01, ge=0, description="Decay of weights, biases and norms left out.")
    temperature: float = Field(2.0, gt=0, description="What logits are divided by before they are compared.")
    save_steps: int = Field(200, ge=1, description="Steps after which the training can be gone on from.")
    seed: int = Field(0, ge=0, description="Seed of every random draw.")
    device: str = Field("auto", description="Device to compute on: auto (a GPU where there is one), cpu, cuda, cuda:1.")
    trust_remote_code: bool = Field(False, description="Allow the models' own Python code to run.")

    @field_validator("recovery")
    @classmethod
    def _known_recovery(cls, value: str) -> str:
        return recovery_named(value).name

    @field_validator("recovery_option", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return tuple(f"{key}={entry}" for key, entry in value.items())
        return (value,) if isinstance(value, str) else value or ()

    def build_recovery(self) -> Recovery:
        """The recovery with its options.

        Raises:
            UsageError: naming the option at fault, or one that was given and means nothing to the recovery.
        """
        options = {}
        for word in self.recovery_option:
            key, equals, value = word.partition("=")
            if not equals:
                raise UsageError(f"recovery_option {word!r}: write name=value, such as rank=8.")
            options[key.strip().replace("-", "_")] = value.strip()
        recovery = make_recovery(self.recovery, options)
        unread = [name for name in recovery.unread if name in self.model_fields_set and getattr(self, name) is not None]
        if unread:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unread)
            raise UsageError(
                f"{flags}: recovery {self.recovery} is in closed form, it has no steps and learns at no rate. Leave "
                f"{flags} out, or train instead: --recovery distil"
            )
        return recovery

    def to_yaml(self) -> str:
        """As it is saved with the model: what was set or differs from None, without what the recovery does not read."""
        return self._yaml_without(self.build_recovery().unread)


def make_tune_recipe(options: dict[str, Any], where: str = "options") -> TuneRecipe:
    """A checked recipe, its recovery's options too.

    Raises:
        UsageError: naming the field and what is wrong with it.
    """
    recipe = check_recipe(TuneRecipe, options, where)
    recipe.build_recovery()
    return recipe
