"""Sentence embeddings from token embeddings, as the configuration of a sentence-transformers folder says."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eckart.errors import DataError, UsageError

OLD_NAMES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Switches of `1_Pooling/config.json` before sentence-transformers 6 -> modes."""

MODES = ("mean", "cls", "lasttoken", "max")
"""The modes that are supported."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pooling:
    """How a sentence embedding is computed from token embeddings.

    Attributes:
        modes: One or several of mean, cls (first real token), lasttoken and max; several are concatenated.
        normalize: Whether the result is scaled to length 1.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False

    @classmethod
    def from_folder(cls, folder: str | Path) -> Pooling | None:
        """Read the pooling of a sentence-transformers folder.

        Args:
            folder: A model folder; `modules.json` names the parts, or `1_Pooling/config.json` is there.

        Returns:
            The pooling, or None if the folder has no configuration of it.

        Raises:
            DataError: If a file cannot be read or names a mode that is not supported.
        """
        folder = Path(folder)
        modules = _read_json(folder / "modules.json") or []
        parts = {str(part.get("type", "")).rpartition(".")[2]: str(part.get("path", "")) for part in modules}
        file = folder / parts.get("Pooling", "1_Pooling") / "config.json"
        config = _read_json(file)
        if config is None:
            return None
        left_out = sorted(set(parts) - {"Transformer", "Pooling", "Normalize"})
        if left_out:
            logger.warning("%s: %s is not applied to the embeddings", folder / "modules.json", ", ".join(left_out))
        named = config.get("pooling_mode") or [mode for name, mode in OLD_NAMES.items() if config.get(name)] or "mean"
        modes = (named,) if isinstance(named, str) else tuple(named)
        for mode in modes:
            if mode not in MODES:
                raise DataError(f"{file}: pooling mode {mode!r} is not known: use one of {', '.join(MODES)}")
        return cls(modes, normalize="Normalize" in parts)

    def __call__(self, output: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Pool.

        Args:
            output: A model's output, or token embeddings (B, T, d).
            attention_mask: (B, T), 1 for real tokens; None if all are.

        Returns:
            Sentence embeddings (B, d), or (B, k d) for k modes; float32 at least. Gradients pass through.
        """
        hidden = last_hidden_state(output)
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        batch, length = hidden.shape[:2]
        if attention_mask is None or attention_mask.shape[1] != length:
            attention_mask = hidden.new_ones(batch, length)
        real = attention_mask.to(hidden.device).bool()  # (B, T)
        pooled = torch.cat([_pool(mode, hidden, real) for mode in self.modes], dim=-1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


def last_hidden_state(output: Any) -> Tensor:
    """Return the token embeddings of a model's output.

    Args:
        output: A model's output (the encoder's side of an encoder-decoder), or the embeddings themselves.

    Returns:
        (B, T, d).

    Raises:
        UsageError: If there are none.
    """
    if isinstance(output, Tensor):
        found: Any = output
    else:
        states = getattr(output, "hidden_states", None)
        choices = (
            getattr(output, "encoder_last_hidden_state", None),
            getattr(output, "last_hidden_state", None),
            states[-1] if states else None,
        )
        found = next((choice for choice in choices if choice is not None), None)
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise UsageError(
            f"{type(output).__name__} holds no last hidden state (batch, tokens, width) to pool: "
            "load the model with AutoModel"
        )
    return found


def _pool(mode: str, hidden: Tensor, real: Tensor) -> Tensor:
    rows = torch.arange(len(hidden), device=hidden.device)
    if mode == "cls":
        return hidden[rows, real.int().argmax(1)]  # the first real token, on whichever side the padding is
    if mode == "lasttoken":
        return hidden[rows, hidden.shape[1] - 1 - real.int().flip(1).argmax(1)]
    if mode == "max":
        return hidden.masked_fill(~real[..., None], -torch.inf).amax(1)
    weights = real[..., None].to(hidden.dtype)
    # Padding is masked before the sum: an embedding that is not finite there does no harm.
    return hidden.masked_fill(~real[..., None], 0).sum(1) / weights.sum(1).clamp(min=1e-9)


def _read_json(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not readable as JSON ({error}): correct the file or download it again") from error
