"""Find the token embeddings of a model and the output heads tied to them, and replace both by factored ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.errors import UsageError
from eckart.forms import Factored, FactoredEmbedding, TiedHead, embedding_named
from eckart.model.replace import replace_module
from eckart.model.sites import matches
from eckart.model.ties import declared_ties, tie_factored

DENSE = "dense"
"""Takes the place of a form's name: embeddings are not factored."""

PROBED = 64
"""Rows that are looked up to see whether an embedding scales them."""


@dataclass(frozen=True)
class EmbeddingTable:
    """One embedding matrix and all modules that use it.

    Attributes:
        embeddings: modules that look tokens up; the name of the first is the name of the table.
        output_heads: output layers that multiply with it.
        shape: (v, d), vocabulary and width.
        scales: embedding -> factor by which it multiplies rows.
        padding: embedding -> its `padding_idx`.
    """

    embeddings: tuple[str, ...]
    output_heads: tuple[str, ...]
    shape: tuple[int, int]
    scales: Mapping[str, float]
    padding: Mapping[str, int | None]

    @property
    def name(self) -> str:
        return self.embeddings[0]

    @property
    def modules(self) -> tuple[str, ...]:
        return (*self.embeddings, *self.output_heads)

    @property
    def elements(self) -> int:
        """Numbers in the matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class EmbeddingTables:
    """The embeddings of a model.

    Attributes:
        chosen: tables that can be factored.
        skipped: every other embedding -> why it is left alone.
    """

    chosen: tuple[EmbeddingTable, ...]
    skipped: dict[str, str]


def find_embedding_tables(model: nn.Module, ignore: Sequence[str] | None = None) -> EmbeddingTables:
    """Find every token embedding: of the model and of the models inside it.

    Args:
        model: a transformers model; on the meta device no embedding is checked for what it does with its rows.
        ignore: names, globs or regular expressions of modules that are left alone, as for :func:`find_sites`.
    """
    tokens = _token_embeddings(model)
    readers: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            readers.setdefault(id(weight), []).append(name)
    tables: list[EmbeddingTable] = []
    skipped: dict[str, str] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or id(module.weight) in seen:
            continue
        together = readers[id(module.weight)]
        if not any(id(model.get_submodule(reader)) in tokens for reader in together):
            skipped[name] = "no token is looked up in it (positions, token types)"
            continue
        seen.add(id(module.weight))
        reason = _reason(model, together, ignore or ())
        if reason is not None:
            skipped |= dict.fromkeys(together, reason)
            continue
        embeddings = [n for n in together if isinstance(model.get_submodule(n), nn.Embedding)]
        rows, width = module.weight.shape
        tables.append(
            EmbeddingTable(
                tuple(embeddings),
                tuple(n for n in together if n not in embeddings),
                (rows, width),
                {n: _scale(model.get_submodule(n)) or 1.0 for n in embeddings},
                {n: model.get_submodule(n).padding_idx for n in embeddings},  # type: ignore[misc]
            )
        )
    return EmbeddingTables(tuple(tables), skipped)


def size_for_fraction(table: EmbeddingTable, form: str, keep: float) -> int:
    """The largest rank, or Kronecker factor, that stores at most a fraction of a table's numbers.

    Raises:
        UsageError: if there is none; the message gives the smallest fraction.
    """
    kind = embedding_named(form)
    size = kind.largest(*table.shape, keep)
    if size < 1:
        rows, width = table.shape
        raise UsageError(
            f"--embeddings-keep {keep:g}: {table.name} is {rows} x {width}, and its smallest {form} form stores "
            f"{kind.least_keep(rows, width):.4f} of that. Raise --embeddings-keep to that or more."
        )
    return size


def saved_embedding_parameters(model: nn.Module, form: str, keep: float, ignore: Sequence[str] | None = None) -> int:
    """Number of parameters that a model saves with its token embeddings in a form; 0 for "dense"."""
    if form == DENSE:
        return 0
    saved = 0
    for table in find_embedding_tables(model, ignore).chosen:
        size = size_for_fraction(table, form, keep)
        saved += table.elements - embedding_named(form).size(*table.shape, size).parameters
    return saved


def replace_embedding(
    model: PreTrainedModel,
    table: EmbeddingTable,
    form: str,
    size: int,
    left: Tensor,
    right: Tensor,
    *,
    causal: Mapping[str, bool],
    dtype: torch.dtype,
) -> None:
    """Replace all modules that use a table by factored ones, and tie them.

    Args:
        model: changed in place.
        table: of this model.
        form: name of a form of embeddings.
        size: rank or Kronecker factor.
        left: (v blocks, k).
        right: (k, d / blocks).
        causal: embedding -> whether it must not see later tokens; only for forms that mix tokens.
        dtype: of the stored numbers.
    """
    before, kind = declared_ties(model), embedding_named(form)
    rows, width = table.shape
    first: FactoredEmbedding | None = None
    for name in table.embeddings:
        old: Any = model.get_submodule(name)
        options: dict[str, Any] = {"padding_idx": table.padding[name], "scale": table.scales[name]}
        options |= {"causal": causal[name]} if kind.contextual else {}
        with torch.device("meta"):
            made = kind(rows, width, size, **options)
        made.to(dtype=dtype).to_empty(device=left.device)
        made.store(left, right)
        first = first or made
        _put(model, name, made, old.weight.requires_grad)
    assert first is not None
    for name in table.output_heads:
        old = model.get_submodule(name)
        with torch.device("meta"):
            head = TiedHead(width, rows, first.rank, first.blocks, bias=False)
        head.codes.weight, head.expand.weight = first.codes.weight, first.expand.weight  # type: ignore[assignment]
        head.register_parameter("bias", old.bias)
        _put(model, name, head, old.weight.requires_grad)
    tie_factored(model, before)


def _put(model: nn.Module, name: str, module: Factored, trains: bool) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(trains)
    replace_module(model, name, module.eval())


def _token_embeddings(model: nn.Module) -> set[int]:
    """Ids of the input embeddings of the model and of the models inside it."""
    found: set[int] = set()
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            try:
                module = part.get_input_embeddings()
            except (NotImplementedError, AttributeError):
                continue
            if isinstance(module, nn.Embedding):
                found.add(id(module))
    return found


def _reason(model: nn.Module, readers: Sequence[str], ignore: Sequence[str]) -> str | None:
    """Why a table cannot be factored; None if it can."""
    for name in readers:
        module = model.get_submodule(name)
        if any(matches(pattern, name) for pattern in ignore):
            return f"{name} is named by --ignore"
        if isinstance(module, nn.Embedding):
            if _scale(module) is None:
                return f"{name} ({type(module).__name__}) computes something else than rows times a number"
            if module.max_norm is not None:
                return f"{name} rescales its rows (max_norm)"
        elif type(module) is not nn.Linear:
            return f"its weight is also read by {name}, a {type(module).__name__}"
    if len(readers) > 1 and not _all_known(model, readers):
        return "its weight is shared by modules that the model does not name as tied"
    if len(readers) == 1 and _should_be_tied(model, readers[0]):
        return "the config ties its weight (tie_word_embeddings), but it is not tied: set tie_word_embeddings to false"
    return None


def _all_known(model: nn.Module, readers: Sequence[str]) -> bool:
    """Whether the declared ties connect all readers: otherwise a loader could not tie them again."""
    keys = getattr(model, "all_tied_weights_keys", {}) or {}
    weights = {f"{name}.weight" for name in readers}
    linked = {source for target, source in keys.items() if target in weights and source in weights}
    targets = {target for target in keys if target in weights}
    return len(linked) == 1 and targets | linked == weights


def _should_be_tied(model: nn.Module, name: str) -> bool:
    expected: dict[str, str] = {}
    if isinstance(model, PreTrainedModel):
        expected = model.get_expanded_tied_weights_keys(all_submodels=True)
    return f"{name}.weight" in expected or f"{name}.weight" in expected.values()


def _scale(module: nn.Module) -> float | None:
    """The factor by which an embedding multiplies its rows; None if it computes anything else."""
    assert isinstance(module, nn.Embedding)
    if type(module).forward is nn.Embedding.forward or module.weight.is_meta:
        return 1.0
    ids = torch.arange(min(PROBED, len(module.weight)), device=module.weight.device)
    rows = module.weight.detach()[ids].double()
    try:
        with torch.no_grad():
            made = module(ids).double()
    except Exception:  # any failure means: not a plain table
        return None
    if made.shape != rows.shape or not bool(rows.any()):
        return None
    measured = float((made * rows).sum() / rows.square().sum())
    # The exact factor is often an attribute or buffer of the module; the measured one has the rounding of the rows.
    known = [float(v) for v in vars(module).values() if isinstance(v, int | float) and not isinstance(v, bool)]
    known += [float(b) for b in module.buffers() if b.numel() == 1]
    rounding = 4 * torch.finfo(module.weight.dtype).eps
    scale = next((value for value in known if abs(value - measured) <= rounding * abs(measured)), measured)
    close = torch.allclose(made, scale * rows, rtol=rounding, atol=rounding * float(made.abs().max()))
    return scale if close else None
