"""What all recipes share: strict fields, messages that name the option, and YAML."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any, TypeVar

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from eckart.errors import UsageError

R = TypeVar("R", bound=BaseModel)


class RecipeBase(BaseModel):
    """The base of a recipe: frozen, no unknown fields, no booleans for numbers, a device that is there."""

    model_config = ConfigDict(extra="forbid", strict=False, frozen=True, allow_inf_nan=False)

    @field_validator("device", check_fields=False)
    @classmethod
    def _known_device(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            torch.empty(0, device=value)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"no such device here ({reason}); use cpu, or a device that torch finds") from None
        return value

    def to_yaml(self) -> str:
        """As it is saved with the model: only what was set or differs from None."""
        return self._yaml_without(())

    def _yaml_without(self, left_out: Collection[str]) -> str:
        """The same without some fields."""
        content = {k: v for k, v in self.model_dump(mode="json").items() if v is not None and k not in left_out}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def no_boolean(value: Any) -> Any:
    """Refuse True where a number is meant; for validators."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not a boolean")
    return value


def checked(kind: type[R], options: dict[str, Any], where: str = "options") -> R:
    """A checked recipe.

    Args:
        kind: of recipe.
        options: field -> value.
        where: what the options come from, for messages.

    Raises:
        UsageError: naming the field, what is wrong with it, and the nearest spelling of an unknown one.
    """
    known = kind.model_fields
    unknown = [key for key in options if key not in known]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}."
        raise UsageError(f"{where}: {unknown[0]!r} is not an option; {hint}")
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        help_text = known[field.split(".")[0]].description
        raise UsageError(f"{where}: {field} = {first['input']!r}: {message} ({help_text})") from None
