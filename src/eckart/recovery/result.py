"""What a training made, and how it is published."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eckart.checkpoint.description import described
from eckart.checkpoint.save import save
from eckart.compression.result import auto_class_of, origin_of
from eckart.recovery.recipe import TuneRecipe
from eckart.report.card import render_model_card
from eckart.report.training import list_tuning_card_rows, render_tuning
from eckart.report.words import to_plain_text
from eckart.storage.lock import OutputLock


@dataclass
class TuneResult:
    """What a training made. `print(result)` shows the table.

    Attributes:
        model: the trained model, or the one before where training made it worse.
        report: everything that was asked, done and measured, as JSON values.
        recipe: what was asked.
        tokenizer: saved with the model.
        source_folder: where the model came from; what lies beside its weights is saved with it.
    """

    model: PreTrainedModel
    report: dict[str, Any]
    recipe: TuneRecipe
    tokenizer: Any = None
    source_folder: Path | None = None

    def __str__(self) -> str:
        return to_plain_text(render_tuning(self.report))

    def save_pretrained(
        self, output_dir: str | Path, *, overwrite: bool = False, lock: OutputLock | None = None
    ) -> Path:
        """Publish the whole folder at once: weights, tokenizer, card, recipe and report.

        Args:
            output_dir: a folder that is not there yet.
            overwrite: replace it if it is there, and holds only what eckart has published there. What the run has read
                is never replaced.
            lock: the lock on the folder, if the caller holds it.

        Returns:
            The published folder.

        Raises:
            CheckpointError: if it cannot be published; then nothing is.
        """
        source = self.source_folder
        if source is not None and self.report["new_head"] and (source / "modules.json").exists():
            source = None  # a classifier is no sentence-transformers model any more
        sentence = source is not None and (source / "modules.json").exists()
        forms = sorted({spec["form"] for spec in described(self.model).values()})
        card = render_model_card(
            Path(output_dir).name,
            base_model=self.recipe.model or getattr(self.model.config, "name_or_path", None) or None,
            auto_class=auto_class_of(type(self.model).__name__),
            library_name="sentence-transformers" if sentence else "transformers",
            method=f"recovery {self.recipe.recovery}",
            form=", ".join(forms) or "dense",
            alone=not forms,
            measured=list_tuning_card_rows(self.report),
            **origin_of(self.source_folder),
        )
        return save(
            self.model, output_dir, tokenizer=self.tokenizer, source_folder=source,
            recipe_yaml=self.recipe.to_yaml(), plan=_plan(self.source_folder), report=self.report, card=card,
            inputs=self.recipe.inputs, overwrite=overwrite, lock=lock,
        )  # fmt: skip


def _plan(folder: Path | None) -> dict[str, Any] | None:
    """The plan that the factors were made by, which training does not change."""
    file = folder / "eckart" / "plan.json" if folder is not None else None
    if file is None or not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else None
