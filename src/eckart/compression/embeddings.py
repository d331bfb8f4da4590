"""Token embeddings of a model that is being made smaller: factored, and put in place with what is tied to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.compression.embedding_statistics import count_tokens, head_inputs, is_causal
from eckart.compression.recipe import Recipe
from eckart.data import CalibrationData
from eckart.distributed import Processes
from eckart.forms import FactoredEmbedding, embedding_named
from eckart.linalg import TableFactors, smoothed
from eckart.model import EmbeddingTable, WeightLoader, find_embedding_tables, replace_embedding, size_for_fraction

DENSE = "dense"


@dataclass
class EmbeddingReport:
    """What became of a model's embeddings.

    Attributes:
        rows: of the report, one for each table.
        skipped: embeddings that were left alone -> why.
        notes: fallbacks taken.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add_to(self, report: dict[str, Any]) -> None:
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
) -> EmbeddingReport:
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
        return EmbeddingReport()
    found = find_embedding_tables(original, recipe.ignore)
    done = EmbeddingReport(skipped=found.skipped)
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
    with processes.failing_together():
        grams = head_inputs(original, found.chosen, data, weights, done.notes) if processes.main else {}
    form = embedding_named(recipe.embeddings)
    for table in found.chosen:
        size = size_for_fraction(table, recipe.embeddings, recipe.embeddings_keep)
        made: TableFactors | None = None
        with processes.failing_together():
            if processes.main:
                weight: Any = original.get_submodule(table.name).weight
                matrix = weight.detach().float()
                counts = count_tokens(original, table, data)
                lookups = smoothed(torch.zeros(table.shape[0]) if counts is None else counts).to(matrix.device)
                gram = grams.get(table.name)
                inputs = None if gram is None else gram.to(matrix.device)
                made = form.solve(matrix, lookups, inputs, size, table.name)
        content = {} if made is None else {k: v for k, v in vars(made).items() if not isinstance(v, Tensor)}
        tensors = {} if made is None else {"left": made.left, "right": made.right}
        tensors, content = processes.broadcast((tensors, content))
        causal = {name: is_causal(original, name) for name in table.embeddings}
        stored = original.get_submodule(table.name).weight.dtype
        assert isinstance(stored, torch.dtype)
        replace_embedding(
            compressed, table, recipe.embeddings, size, tensors["left"], tensors["right"], causal=causal,
            dtype=dtype or stored,
        )  # fmt: skip
        done.notes += content["notes"]
        done.rows.append(_row(table, form, size, content))
        if form.advice:
            done.notes.append(f"{table.name}: {form.advice}")
        if form.contextual and any(causal.values()):
            done.notes.append(_without_cache(compressed, table))
    return done


def _row(table: EmbeddingTable, form: type[FactoredEmbedding], size: int, content: Mapping[str, Any]) -> dict[str, Any]:
    """A table in the report."""
    row = {
        "table": table.name,
        "modules": list(table.embeddings),
        "heads": list(table.output_heads),
        "shape": list(table.shape),
        "form": form.form,
        form.sizes[-1]: size,
        "before": table.elements,
        "after": form.size(*table.shape, size).parameters,
        "lookup_error": content["lookup_error"],
    }
    if content["head_error"] is not None:
        row |= {"head_error": content["head_error"], "objective": list(content["history"]), "solution": "approximate"}
    else:
        row |= {"solution": "exact"}
    return row


def _without_cache(compressed: PreTrainedModel, table: EmbeddingTable) -> str:
    """Have text generated without a key-value cache: with one, a step shows the embedding the last token alone."""
    for config in (compressed.config, compressed.config.get_text_config(), compressed.generation_config):
        if config is not None:
            config.use_cache = False
    return f"{table.name}: attends to earlier tokens, so text is generated without a key-value cache"
