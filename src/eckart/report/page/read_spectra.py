"""Singular values of the weights of a published folder, and of those that they were made from."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.checkpoint.description import is_special
from eckart.checkpoint.load import load
from eckart.errors import EckartError, UsageError
from eckart.model import dense_weight, to_dense_modules, with_separate_experts
from eckart.quantization import dequantize, quantized_layers
from eckart.report.page.spectra import Spectrum

logger = logging.getLogger(__name__)

MOST = 48
"""Weights that are drawn at most: a page is to be looked at."""


def read_spectra(
    folder: Path,
    report: Mapping[str, Any],
    patterns: Sequence[str],
    *,
    original: str | None = None,
    trust_remote_code: bool = False,
) -> list[Spectrum]:
    """The spectra of the weights that patterns name.

    Args:
        folder: that was published.
        report: its report.
        patterns: names or globs; each matches a whole dotted name, or its end after a dot.
        original: folder or hub name of the original; None for the one that the report names, where it is there.
        trust_remote_code: allow the models' own Python code to run.

    Raises:
        CheckpointError: a model cannot be loaded.
        UsageError: a pattern matches no weight.
    """
    stored = {site["site"]: site for site in report.get("sites", ())}
    model = load(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if quantized_layers(model):
        dequantize(model)
    if is_special(model):
        to_dense_modules(model)
    model = with_separate_experts(model)
    names = _match(patterns, [*stored] or [name for name, module in model.named_modules() if _is_matrix(module)])
    if len(names) > MOST:
        logger.warning("%d weights match; the spectra of the first %d are drawn", len(names), MOST)
        names = names[:MOST]
    before = _open_original(original, report, trust_remote_code)
    spectra = []
    for name in names:
        site = stored.get(name, {})
        form = str(site.get("form", "dense"))
        spectra.append(
            Spectrum(
                name,
                form,
                int(site["rank"]) if site and form != "dense" else None,
                _values(model, name),
                _values(before, name) if before is not None else (),
            )
        )
    return spectra


def _match(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        matching = {
            name for name in names if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
        }
        if not matching:
            raise UsageError(
                f"--spectra {pattern}: no weight has such a name. Give a name or a glob, such as {names[0]}"
                if names
                else f"--spectra {pattern}: the report names no weights."
            )
        found |= matching
    return [name for name in names if name in found]


def _open_original(original: str | None, report: Mapping[str, Any], trust_remote_code: bool) -> nn.Module | None:
    """The model that the folder was made from; None where nobody named it and it is not there any more."""
    name = original or report.get("recipe", {}).get("model")
    if report.get("kind") == "tune" and original is None:  # its model is factored already
        return None
    if not name:
        return None
    try:
        return with_separate_experts(load(name, dtype=torch.float32, trust_remote_code=trust_remote_code))
    except EckartError as error:
        if original is not None:
            raise
        logger.warning("no spectra of the original: %s", error)
        return None


def _values(model: nn.Module, name: str) -> tuple[float, ...]:
    """The singular values of a weight, falling; () where the model has no such weight."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return ()
    if not _is_matrix(module):
        return ()
    return tuple(torch.linalg.svdvals(dense_weight(module).float()).tolist())


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)
