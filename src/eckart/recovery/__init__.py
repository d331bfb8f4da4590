"""Recovering the quality of a compressed model: in closed form, and by training.

A new recovery is one file with one class on :class:`Recovery`, and one line in :data:`eckart.registry.RECOVERIES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eckart.lookup.lazy import lazy_attributes
from eckart.registry import RECOVERIES

if TYPE_CHECKING:
    from eckart.recovery.base import ClosedFormRecovery, Recovery, RecoveryContext
    from eckart.recovery.block import Block
    from eckart.recovery.distil import Distil, InterLayer, NoachGoldberg
    from eckart.recovery.dsee import DSEE
    from eckart.recovery.early_exit import EarlyExitRecovery
    from eckart.recovery.full import Full
    from eckart.recovery.lora import LoRA
    from eckart.recovery.losparse import LoSparse, LoSparseDistilled
    from eckart.recovery.refit import Refit
    from eckart.recovery.sandwich import Sandwich
    from eckart.recovery.settings import make_recovery
    from eckart.recovery.token_skipping import TokenSkippingRecovery
    from eckart.recovery.training.adapter import Adapter, load_adapter, save_adapter

__all__ = [
    "DSEE",
    "RECOVERIES",
    "Adapter",
    "Block",
    "ClosedFormRecovery",
    "Distil",
    "EarlyExitRecovery",
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
    "TokenSkippingRecovery",
    "load_adapter",
    "make_recovery",
    "save_adapter",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "training.adapter": ("Adapter", "load_adapter", "save_adapter"),
        "base": ("ClosedFormRecovery", "Recovery", "RecoveryContext"),
        "block": ("Block",),
        "distil": ("Distil", "InterLayer", "NoachGoldberg"),
        "dsee": ("DSEE",),
        "early_exit": ("EarlyExitRecovery",),
        "full": ("Full",),
        "lora": ("LoRA",),
        "losparse": ("LoSparse", "LoSparseDistilled"),
        "settings": ("make_recovery",),
        "refit": ("Refit",),
        "sandwich": ("Sandwich",),
        "token_skipping": ("TokenSkippingRecovery",),
    },
)
