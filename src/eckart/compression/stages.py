"""What each stage of a compression brought, as held-out text says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stages:
    """Distances to the original on held-out text, after one stage after another.

    Attributes:
        found: `stage`, `distance`, and whether the model was `kept`, in their order.
    """

    found: list[dict[str, Any]] = field(default_factory=list)

    def add(self, stage: str, distance: float, *, kept: bool) -> None:
        """Note a stage.

        Args:
            stage: "factors", "refit", "refinement" or "distillation".
            distance: to the original, after it.
            kept: whether that is the model that is gone on with.
        """
        self.found.append({"stage": stage, "distance": distance, "kept": kept})
