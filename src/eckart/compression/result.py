"""The result of a compression, and its publication."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eckart.allocation import Plan
from eckart.checkpoint.push import push_result
from eckart.checkpoint.save import save
from eckart.compression.recipe import Recipe
from eckart.report.card import render_model_card
from eckart.report.compression import list_card_rows, list_quality, render_compression
from eckart.report.loading import find_loading
from eckart.report.origin import origin_of
from eckart.report.page.again import make_again
from eckart.report.page.pages import render_or_warn
from eckart.report.results import list_results
from eckart.report.words import to_plain_text
from eckart.storage.lock import OutputLock


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
        verify: bool = False,
    ) -> Path:
        """Publish the whole folder at once: weights, tokenizer, card, recipe, plan and report.

        Args:
            output_dir: a folder that is not there yet.
            overwrite: replace it if it is there, and holds only what eckart has published there. What the run has read
                is never replaced.
            lock: the lock on the folder, if the caller holds it.
            verify: let a fresh process read the folder back before it is put in place.
            max_shard_size: of a file of weights.

        Returns:
            The published folder.

        Raises:
            CheckpointError: if it cannot be published; then nothing is.
        """
        loading = find_loading(self.model, self.source_folder)
        origin = origin_of(self.source_folder)
        task = origin.get("pipeline_tag") or loading.task
        original = self.recipe.model or getattr(self.model.config, "name_or_path", None)
        card = render_model_card(
            Path(output_dir).name,
            base_model=original or None,
            loading=loading,
            method=self.report["method"],
            form=self.report["form"],
            measured=list_card_rows(self.report),
            results=list_results(list_quality(self.report), self.report["data"], "held-out part", task),
            **origin,
        )
        name = Path(output_dir).name
        page = render_or_warn(self.report, name, loading=loading.lines(name), again=make_again(self.report, name))
        return save(
            self.model,
            output_dir,
            tokenizer=self.tokenizer,
            source_folder=self.source_folder,
            recipe_yaml=self.recipe.to_yaml(),
            plan=self.plan.to_json(),
            report=self.report,
            report_html=page,
            card=card,
            inputs=self.recipe.inputs,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            lock=lock,
            verify=verify,
            trust_remote_code=self.recipe.trust_remote_code,
        )

    def push_to_hub(self, name: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Push the model to the Hugging Face hub, as :func:`eckart.push_folder` does.

        What was published is pushed from its folder; a result that was not is written to a temporary one.

        Args:
            name: of the repository, `user/model`.
            private: whether only its owner sees it.
            token: of the hub; None for the one that `hf auth login` stored.

        Returns:
            The address of the model's page.

        Raises:
            CheckpointError: the push failed.
            UsageError: there is no such name, or nobody is logged in.
        """
        return push_result(self.save_pretrained, self.folder, name, private=private, token=token)


def load_lines(result: Result, folder: Path) -> str:
    """Return the lines of Python that load a published folder."""
    return find_loading(result.model, result.source_folder).lines(folder)
