"""The recipe of a tuning: everything that was asked for, as data, saved with the model.

No import of torch here: `eckart tune --help` reads the fields of :class:`TuneRecipe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from eckart.config import STRICT, RecipeBase, check_recipe
from eckart.errors import UsageError
from eckart.recovery.settings import PYTHON, make_recovery, name_of, settings_in_words
from eckart.registry import METHODS, RECOVERIES

if TYPE_CHECKING:
    from eckart.recovery.base import Recovery


class TuneRecipe(RecipeBase):
    """What a tuning is asked to do. Options that are None take the recovery's setting or a default.

    The same names are the command line's flags, the keys of `--config run.yaml` and the keyword arguments of
    :func:`eckart.tune`. `recovery` may also be an object, such as `LoRA(rank=8)`: its settings become
    `recovery_option`.
    """

    renamed: ClassVar[Mapping[str, str]] = {"method": "recovery", "data_pair_column": "data_target_column"}

    model: str | None = Field(None, description="Folder or hub name of the model to train, factored or dense.")
    revision: str | None = Field(None, description="Revision of the model on the hub. Default: main.")
    teacher: str | None = Field(None, description="Folder or hub name of the model to learn from.")
    teacher_revision: str | None = Field(None, description="Revision of the teacher on the hub. Default: main.")
    recovery: str = Field("distil", description="How quality is recovered; `eckart methods` lists the names.")
    recovery_option: tuple[str, ...] = Field((), description="A setting of the recovery: name=value, such as rank=8.")
    task: Literal["auto", "classification", "regression", "masked", "causal", "embedding", "logits"] = Field(
        "auto",
        description="What is learned; auto: what fits the model's output head and the data's columns. embedding: the "
        "teacher's sentence embeddings, for a model without an output head. logits: the teacher's predictions, without "
        "labels.",
    )
    data: str | None = Field(None, description="Text or labeled rows: a file, a folder, a hub data set, or 'stdlib'.")
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
    data_label_column: str | None = Field(
        None, description="Column that holds the label or score. Default: found by its name."
    )
    data_revision: str | None = Field(None, description="Revision of the hub data set. Default: main.")
    eval_data: str | None = Field(
        None, description="What the model is scored on before and after. Default: a tenth of the data, held out."
    )
    eval_split: str = Field("validation", description="Split of the hub data set that --eval-data names.")
    eval_samples: int | None = Field(None, ge=1, description="Score only this many rows or windows. Default: all.")
    num_samples: int | None = Field(None, ge=1, description="Train on only this many rows or windows. Default: all.")
    epochs: float = Field(3.0, gt=0, description="How often the data are read.")
    max_steps: int | None = Field(
        None, ge=1, description="Steps of the optimizer, in place of epochs. Default: as many as the epochs have."
    )
    learning_rate: float | None = Field(None, gt=0, description="Highest learning rate. Default: the recovery's.")
    batch_size: int = Field(16, ge=1, description="Rows or windows of a batch.")
    gradient_accumulation: int = Field(
        1, ge=1, description="Batches whose gradients are averaged for one step, to train with larger batches."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, about a third more time."
    )
    bf16: bool = Field(
        False, description="Compute in bfloat16 where torch.autocast does; weights and optimizer stay in float32."
    )
    max_seq_length: int | None = Field(
        None, ge=2, description="Tokens of a row or window. Default: 512, or the model's positions if fewer."
    )
    warmup: float = Field(0.06, ge=0, lt=1, description="Fraction of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay; biases and norms have none.")
    temperature: float = Field(2.0, gt=0, description="What logits are divided by before they are compared.")
    save_steps: int = Field(200, ge=1, description="Steps between the states from which a training can resume.")
    seed: int = Field(0, ge=0, description="Seed of every random draw.")
    device: str = Field(
        "auto", description="Device to compute on: cpu, cuda, cuda:1, mps; auto: a GPU where there is one."
    )
    trust_remote_code: bool = Field(False, description="Allow the models' own Python code to run.")
    strict: bool = Field(False, description=STRICT)

    @model_validator(mode="before")
    @classmethod
    def _settings_of_object(cls, content: Any) -> Any:
        found = content.get("recovery") if isinstance(content, Mapping) else None
        if found is None or isinstance(found, str):
            return content
        return {**content, "recovery": name_of(found), "recovery_option": settings_in_words(found)}

    @field_validator("recovery")
    @classmethod
    def _known_recovery(cls, value: str) -> str:
        if value in METHODS and value not in RECOVERIES:
            raise UsageError(
                f"recovery {value!r} is a method, by which a model is factored: eckart compress MODEL --method {value} "
                "--output-dir DIR; the quality that was lost is then recovered by one of: " + ", ".join(RECOVERIES)
            )
        return value if value.startswith(PYTHON) else RECOVERIES.check(value)

    @field_validator("recovery_option", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return tuple(f"{key}={entry}" for key, entry in value.items())
        return (value,) if isinstance(value, str) else value or ()

    @classmethod
    def combine(cls, content: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Options win; where they name another recovery, the settings of the one before are left out."""
        combined = super().combine(content, options)
        default = cls.model_fields["recovery"].default
        if combined.get("recovery", default) != content.get("recovery", default) and "recovery_option" not in options:
            combined.pop("recovery_option", None)
        return combined

    def build_recovery(self) -> Recovery:
        """The recovery with its settings, from the names in this recipe.

        Raises:
            UsageError: naming the setting at fault, or a class that no registry knows.
        """
        if self.recovery.startswith(PYTHON):
            place = self.recovery.removeprefix(PYTHON)
            raise UsageError(
                f"recovery {self.recovery}: {place} was passed from Python, and no name is registered for it, so this "
                "recipe alone cannot make the run again. Pass the object: eckart.tune(..., recovery="
                f"{place.rpartition('.')[2]}(...)); or register the class: "
                "eckart.register_recovery(CLASS)"
            )
        options = {}
        for word in self.recovery_option:
            key, equals, value = word.partition("=")
            if not equals:
                raise UsageError(f"recovery_option {word!r}: write name=value, such as rank=8.")
            options[key.strip().replace("-", "_")] = value.strip()
        return make_recovery(self.recovery, options)

    def check_used(self, recovery: Recovery) -> None:
        """Refuse options that were given and that the recovery does not use.

        Raises:
            UsageError: naming them.
        """
        unused = [key for key in recovery.unused_options if key in self.model_fields_set and self._changed(key)]
        if unused:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise UsageError(
                f"{flags}: recovery {self.recovery} {recovery.why_unused}. Leave "
                f"{flags} out, or train instead: --recovery distil"
            )

    def _changed(self, key: str) -> bool:
        value = getattr(self, key)
        return value is not None and value is not False

    def to_yaml(self) -> str:
        """As it is saved with the model: what is not None, without the options that the recovery does not use."""
        known = not self.recovery.startswith(PYTHON)
        return self._yaml_without(type(self.build_recovery()).unused_options if known else ())


def make_tune_recipe(options: Mapping[str, Any], where: str = "options") -> TuneRecipe:
    """A checked recipe, its recovery's settings too.

    Raises:
        UsageError: naming the field and what is wrong with it.
    """
    recipe = check_recipe(TuneRecipe, options, where)
    recipe.check_used(recipe.build_recovery())
    return recipe
