"""Ways to make quality come back after factoring: in closed form, and by training.

A new recovery is one file with one class on :class:`Recovery`, and one line in :data:`eckart.registry.RECOVERIES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eckart.registry import RECOVERIES, lazy_attributes

if TYPE_CHECKING:
    from eckart.recovery.adapter import Adapter, load_adapter, save_adapter
    from eckart.recovery.base import ClosedFormRecovery, Recovery, RecoveryContext
    from eckart.recovery.distil import Distil, InterLayer, NoachGoldberg
    from eckart.recovery.dsee import DSEE
    from eckart.recovery.full import Full
    from eckart.recovery.lora import LoRA
    from eckart.recovery.losparse import LoSparse, LoSparseDistilled
    from eckart.recovery.options import make_recovery, recovery_named
    from eckart.recovery.refit import Refit
    from eckart.recovery.sandwich import Sandwich

__all__ = [
    "DSEE",
    "RECOVERIES",
    "Adapter",
    "ClosedFormRecovery",
    "Distil",
    "Full",
    "InterLayer",
    "LoRA",
    "LoSparse",
    "LoSparseDistilled",
    "NoachGoldberg",
    "Recovery",
    "RecoveryContext",
    "Refit",
    "Sandwich",
    "load_adapter",
    "make_recovery",
    "recovery_named",
    "save_adapter",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "adapter": ("Adapter", "load_adapter", "save_adapter"),
        "base": ("ClosedFormRecovery", "Recovery", "RecoveryContext"),
        "distil": ("Distil", "InterLayer", "NoachGoldberg"),
        "dsee": ("DSEE",),
        "full": ("Full",),
        "lora": ("LoRA",),
        "losparse": ("LoSparse", "LoSparseDistilled"),
        "options": ("make_recovery", "recovery_named"),
        "refit": ("Refit",),
        "sandwich": ("Sandwich",),
    },
)
