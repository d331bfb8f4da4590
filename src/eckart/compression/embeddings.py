"""Token embeddings of a model that is being made smaller: factored, measured, and put in place with what is tied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.calibration.forward_context import ready
from eckart.calibration.layerwise import all_blocks
from eckart.compression.recipe import Recipe
from eckart.data import Batch, CalibrationData, model_kind
from eckart.data.batch import SIDES
from eckart.data.inference import forward, progress
from eckart.distributed import Processes
from eckart.forms import EMBEDDINGS
from eckart.linalg import TableFactors, in_blocks, smoothed, table_factors, tied_factors
from eckart.model import EmbeddingTable, WeightLoader, find_embedding_tables, replace_embedding, size_for_fraction
from eckart.moments import gather

DENSE = "dense"


@dataclass
class Embedded:
    """What became of a model's embeddings.

    Attributes:
        rows: of the report, one for each table.
        skipped: embeddings that were left alone -> why.
        notes: fallbacks taken.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def join(self, report: dict[str, Any]) -> None:
        """Write into a run's report: `embeddings`, `kept.of_embeddings`, and what is skipped."""
        report["embeddings"] = self.rows
        report["skipped"] = {**report["skipped"], **self.skipped}
        for row in self.rows:
            for name in (*row["modules"], *row["heads"]):
                report["skipped"].pop(name, None)
        if self.rows:
            before = sum(row["before"] for row in self.rows)
            report["kept"]["of_embeddings"] = sum(row["after"] for row in self.rows) / before


def factor_embeddings(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    recipe: Recipe,
    data: CalibrationData | None,
    weights: WeightLoader,
    processes: Processes,
    dtype: torch.dtype | None,
) -> Embedded:
    """Put factored embeddings into a copy of a model.

    Args:
        original: whose tables are factored, and whose head's inputs are gathered.
        compressed: changed in place.
        recipe: form and size.
        data: what tokens are counted on; None counts all alike.
        weights: of the original, brought in as they are needed.
        processes: the first one factors, for all.
        dtype: of stored numbers; None for the table's own.

    Raises:
        UsageError: if a table cannot be made that small.
        NumericalError: naming a table that is not finite.
    """
    if recipe.embeddings == DENSE:
        return Embedded()
    found = find_embedding_tables(original, recipe.ignore)
    done = Embedded(skipped=found.skipped)
    if not found.chosen:
        done.notes.append(
            f"--embeddings {recipe.embeddings}: {type(original).__name__} has no token embedding to factor"
        )
    else:
        listed = ", ".join(f"{table.name}" for table in found.chosen)
        if len(found.chosen) > 1:
            done.notes.append(f"{len(found.chosen)} token embeddings are factored, each by itself: {listed}")
        if data is None:
            done.notes.append("embeddings: no calibration data, so every token counts the same")
    with processes.together():
        grams = _head_inputs(original, found.chosen, data, weights, done.notes) if processes.main else {}
    for table in found.chosen:
        size = size_for_fraction(table, recipe.embeddings, recipe.embeddings_keep)
        made: TableFactors | None = None
        with processes.together():
            if processes.main:
                counts = _counts(original, table, data)
                gram = grams.get(table.name)
                made = _solved(original, table, recipe.embeddings, size, counts, gram)
        content = {} if made is None else {k: v for k, v in vars(made).items() if not isinstance(v, Tensor)}
        tensors = {} if made is None else {"left": made.left, "right": made.right}
        tensors, content = processes.broadcast((tensors, content))
        causal = {name: _is_causal(original, name) for name in table.embeddings}
        stored = original.get_submodule(table.name).weight.dtype
        assert isinstance(stored, torch.dtype)
        replace_embedding(
            compressed, table, recipe.embeddings, size, tensors["left"], tensors["right"], causal=causal,
            dtype=dtype or stored,
        )  # fmt: skip
        done.notes += content["notes"]
        done.rows.append(_row(table, recipe.embeddings, size, content))
        if recipe.embeddings == "safe":
            done.notes += _safe_notes(compressed, table, causal)
    return done


def _row(table: EmbeddingTable, form: str, size: int, content: Mapping[str, Any]) -> dict[str, Any]:
    """A table in the report."""
    row = {
        "table": table.name,
        "modules": list(table.embeddings),
        "heads": list(table.heads),
        "shape": list(table.shape),
        "form": EMBEDDINGS[form].form,
        "factor" if form == "kronecker" else "rank": size,
        "before": table.elements,
        "after": EMBEDDINGS[form].size(*table.shape, size).parameters,
        "lookup_error": content["lookup_error"],
    }
    if content["head_error"] is not None:
        row |= {"head_error": content["head_error"], "objective": list(content["history"]), "solution": "approximate"}
    else:
        row |= {"solution": "exact"}
    return row


def _safe_notes(compressed: PreTrainedModel, table: EmbeddingTable, causal: Mapping[str, bool]) -> list[str]:
    notes = [f"{table.name}: as good as low-rank until it is trained to follow the original: `eckart tune`"]
    if any(causal.values()):
        # With a key-value cache a step shows the embedding the last token alone.
        for config in (compressed.config, compressed.config.get_text_config(), compressed.generation_config):
            if config is not None:
                config.use_cache = False
        notes.append(f"{table.name}: attends to earlier tokens, so text is generated without a key-value cache")
    return notes


def _solved(
    model: PreTrainedModel, table: EmbeddingTable, form: str, size: int, counts: Tensor | None, gram: Tensor | None
) -> TableFactors:
    """Factors of a table in the layout of its form."""
    weight: Any = model.get_submodule(table.name).weight
    matrix = weight.detach().float()
    lookups = smoothed(torch.zeros(table.shape[0]) if counts is None else counts).to(matrix.device)
    rank = size
    if form == "kronecker":
        rank = 1
        matrix, lookups, gram = in_blocks(matrix, lookups, gram, table.shape[1] // size)
    if gram is None:
        return table_factors(matrix, lookups, rank, table.name)
    return tied_factors(matrix, lookups, gram.to(matrix.device), rank, what=table.name)


def _counts(model: PreTrainedModel, table: EmbeddingTable, data: CalibrationData | None) -> Tensor | None:
    """(v,) how often each token of the data is looked up in a table; None without token ids."""
    if data is None:
        return None
    rows = table.shape[0]
    counts = torch.zeros(rows, dtype=torch.float64)
    sides = _sides(model, table)
    for batch in data.batches:
        masks = batch.masks()
        for ids, _ in sides:
            given = batch.inputs.get(ids)
            if given is None or given.is_floating_point():
                continue
            flat = given.reshape(-1, given.shape[-1])
            mask = masks.get(flat.shape[-1])
            real = flat if mask is None or mask.shape != flat.shape else flat[mask]
            real = real[(real >= 0) & (real < rows)].flatten()
            counts += torch.bincount(real, minlength=rows).double()
    return counts


def _sides(model: PreTrainedModel, table: EmbeddingTable) -> Sequence[tuple[str, str]]:
    """Whose tokens a table is asked for: both sides' of an encoder-decoder, unless it belongs to one of them."""
    if not model.config.is_encoder_decoder:
        return SIDES[:1]
    inside = [_in_decoder(model, name) for name in table.embeddings]
    if None in inside or len(set(inside)) > 1:
        return SIDES
    return SIDES[1:] if inside[0] else SIDES[:1]


def _in_decoder(model: PreTrainedModel, name: str) -> bool | None:
    """Whether a module is in the decoder, not in the encoder; None if it is in neither, or in both."""
    module = model.get_submodule(name)
    encoder, decoder = (
        any(module is part for part in half.modules()) if half is not None and half is not model else False
        for half in (model.get_encoder(), model.get_decoder())
    )
    return None if encoder == decoder else decoder


def _is_causal(model: PreTrainedModel, name: str) -> bool:
    """Whether an embedding must not look at later tokens; where it is not known, it must not."""
    if model.config.is_encoder_decoder:
        return _in_decoder(model, name) is not False
    return model_kind(model.config, model) == "causal"


def _head_inputs(
    model: PreTrainedModel,
    tables: Sequence[EmbeddingTable],
    data: CalibrationData | None,
    weights: WeightLoader,
    notes: list[str],
) -> dict[str, Tensor]:
    """Table -> `E[h h^T]` of what its heads multiply, gathered in one pass over the data."""
    heads = {head: (head,) for table in tables for head in table.heads}
    if not heads or data is None:
        return {}

    def step(batch: Batch) -> None:
        forward(model, batch.inputs)

    with ready(model, weights, all_blocks(model))(None):
        batches = progress(data.batches, what="inputs of tied heads", total=len(data))
        found = gather(model, heads, batches, step, needs=frozenset({"gram"}))
    grams: dict[str, Tensor] = {}
    for table in tables:
        seen = [found[head].inputs for head in table.heads if found[head].inputs.count]
        if seen:
            total = sum(inputs.count for inputs in seen)
            grams[table.name] = sum(inputs.mean_gram * (inputs.count / total) for inputs in seen)  # type: ignore[assignment]
        elif table.heads:
            notes.append(f"{table.heads[0]}: no token of the data was seen there, so only look-ups weigh {table.name}")
    return grams
