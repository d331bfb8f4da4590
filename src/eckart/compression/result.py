"""The result of a compression, and its publication."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel
from yaml import YAMLError

from eckart.allocation import Plan
from eckart.checkpoint.description import is_special
from eckart.checkpoint.save import save
from eckart.compression.recipe import Recipe
from eckart.report.card import render_model_card
from eckart.report.compression import list_card_rows, render_compression
from eckart.report.words import to_plain_text
from eckart.storage.lock import OutputLock

# Class name ending -> the Auto class that loads it, for the code example of the model card.
AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
}


@dataclass
class Result:
    """The result of a compression. `print(result)` shows its tables.

    Attributes:
        model: the compressed model; the one that was passed in is as it was.
        plan: site -> form and rank.
        report: everything that was asked, done and measured, as JSON values.
        recipe: what was asked.
        tokenizer: saved with the model.
        source_folder: where the model came from; what lies beside its weights is saved with it.
        folder: the published folder, where the compression published one.
    """

    model: PreTrainedModel
    plan: Plan
    report: dict[str, Any]
    recipe: Recipe
    tokenizer: Any = None
    source_folder: Path | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        return to_plain_text(render_compression(self.report))

    def save_pretrained(
        self,
        output_dir: str | Path,
        *,
        overwrite: bool = False,
        lock: OutputLock | None = None,
        max_shard_size: int | str = "50GB",
    ) -> Path:
        """Publish the whole folder at once: weights, tokenizer, card, recipe, plan and report.

        Args:
            output_dir: a folder that is not there yet.
            overwrite: replace it if it is there, and holds only what eckart has published there. What the run has read
                is never replaced.
            lock: the lock on the folder, if the caller holds it.
            max_shard_size: of a file of weights.

        Returns:
            The published folder.

        Raises:
            CheckpointError: if it cannot be published; then nothing is.
        """
        sentence = self.source_folder is not None and (self.source_folder / "modules.json").exists()
        original = self.recipe.model or getattr(self.model.config, "name_or_path", None)
        card = render_model_card(
            Path(output_dir).name,
            base_model=original or None,
            auto_class=auto_class_of(type(self.model).__name__),
            library_name="sentence-transformers" if sentence else "transformers",
            method=self.report["method"],
            form=self.report["form"],
            alone=not is_special(self.model),
            measured=list_card_rows(self.report),
            **origin_of(self.source_folder),
        )
        return save(
            self.model,
            output_dir,
            tokenizer=self.tokenizer,
            source_folder=self.source_folder,
            recipe_yaml=self.recipe.to_yaml(),
            plan=self.plan.to_json(),
            report=self.report,
            card=card,
            inputs=self.recipe.inputs,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            lock=lock,
        )


def load_lines(result: Result, folder: Path) -> str:
    """Return the lines of Python that load a published folder."""
    if result.source_folder is not None and (result.source_folder / "modules.json").exists():
        library, name, call = "sentence_transformers", "SentenceTransformer", f"SentenceTransformer({str(folder)!r})"
    else:
        library, name = "transformers", auto_class_of(type(result.model).__name__)
        call = f"{name}.from_pretrained({str(folder)!r})"
    lines = f"from {library} import {name}\nmodel = {call}"
    return f"import eckart  # registers the checkpoint format\n{lines}" if is_special(result.model) else lines


def origin_of(folder: Path | None) -> dict[str, Any]:
    """Read licence, language and task of the original from its model card."""
    file = folder / "README.md" if folder is not None else None
    if file is None or not file.is_file():
        return {}
    try:
        stated = ModelCard.load(file).data.to_dict()
    except (ValueError, YAMLError):  # a card without metadata, or with broken metadata, states nothing
        return {}
    return {key: stated[key] for key in ("license", "language", "pipeline_tag") if stated.get(key)}


def auto_class_of(name: str) -> str:
    """Return the name of the Auto class that loads a model class."""
    return next((auto for ending, auto in AUTO_CLASSES.items() if name.endswith(ending)), "AutoModel")
