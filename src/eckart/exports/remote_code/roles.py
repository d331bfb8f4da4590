"""What modules of one kind in all layers have in common: their name without numbers."""

from __future__ import annotations

import re


def role_of(name: str) -> str:
    """A module's name with `*` for numbers, as plans of tensor parallelism have it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
