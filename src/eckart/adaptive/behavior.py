"""What can be attached to a model: the base class of behaviors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import nn
from transformers import PreTrainedModel

from eckart.adaptive.walk import Walk


class Behavior:
    """Decides between blocks which rows and tokens go on.

    The order of the calls: `begin` once a pass, then for each block `before_block`, the block itself, `after_block`,
    and `end` once. A pass that has no rows left runs no more blocks. The behavior must be safe to copy: what it knows
    of a pass it keeps in `walk.memory[self.name]`, the modules that it needs it finds under their names in
    `walk.model`.

    Class attributes:
        name: key in `config.json`, and the name of its recovery.
        title: one line for tables.
        paper: authors, year, identifier.
        keywords: of `model(...)` that it takes for itself, for one call.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    keywords: ClassVar[tuple[str, ...]] = ()

    def spec(self) -> dict[str, Any]:
        """JSON for a checkpoint's config; it grows by no default that is not written."""
        raise NotImplementedError

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`spec`.

        Raises:
            UsageError: if an entry is missing or cannot be right.
        """
        raise NotImplementedError

    def misfit(self, model: PreTrainedModel, blocks: int) -> str | None:
        """Why a model, of another class than the one that was saved, cannot behave so; None if it can."""
        return None

    def modules(self) -> dict[str, nn.Module]:
        """Attribute of the model -> module that the behavior needs there, new, on the CPU."""
        return {}

    def attached(self, model: PreTrainedModel, blocks: tuple[str, ...]) -> None:
        """It has been put on a model: change what it needs otherwise there."""

    def detached(self, model: PreTrainedModel, blocks: tuple[str, ...]) -> None:
        """It is being taken off: undo :meth:`attached`."""

    def in_words(self, blocks: int) -> str:
        """One line for cards and tables.

        Args:
            blocks: that a pass calls.
        """
        raise NotImplementedError

    def begin(self, walk: Walk) -> None:
        """A pass begins; nothing of the batch is known yet but its mask. `walk.options[self.name]`: keywords given."""

    def before_block(self, walk: Walk, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """A block will be called with these, already without what has left; returns what it is called with."""
        return args, kwargs

    def after_block(self, walk: Walk) -> None:
        """A block has been called: `walk.done` of them have been. Rows and tokens leave by `walk.keep_...`."""

    def end(self, walk: Walk, output: Any) -> Any:
        """The model has returned an output for the whole batch; returns what its caller gets."""
        return output
