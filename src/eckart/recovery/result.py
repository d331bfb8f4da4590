"""What a tuning made: the better model, the report, and the published folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.adaptive import behaviors_of, in_words
from eckart.checkpoint.description import attach_config, described, is_factored
from eckart.checkpoint.push import push_result
from eckart.checkpoint.save import save
from eckart.model import cast, shared_parameters
from eckart.recovery.base import Recovery
from eckart.recovery.recipe import TuneRecipe
from eckart.recovery.settings import settings_of
from eckart.recovery.student import Student
from eckart.recovery.training import Scorer, TrainingData, is_better
from eckart.recovery.training.scorer import Scores
from eckart.report.card import render_model_card
from eckart.report.loading import find_loading
from eckart.report.origin import origin_of
from eckart.report.page.again import make_again
from eckart.report.page.pages import render_or_warn
from eckart.report.results import list_results
from eckart.report.training import list_tuning_card_rows, render_tuning
from eckart.report.words import to_plain_text
from eckart.storage.lock import OutputLock


@dataclass
class TuneResult:
    """What a tuning made. `print(result)` shows the table.

    Attributes:
        model: the trained model, or the one before where training made it worse.
        report: everything that was asked, done and measured, as JSON values.
        recipe: the options.
        tokenizer: saved with the model.
        source_folder: where the model came from; the other files of that folder are saved with it.
        folder: where it was published; None where it was not.
        recovery: the one that was used, with what it holds afterwards, such as the adapter of DSEE.
    """

    model: PreTrainedModel
    report: dict[str, Any]
    recipe: TuneRecipe
    tokenizer: Any = None
    source_folder: Path | None = None
    folder: Path | None = None
    recovery: Recovery | None = None

    def __str__(self) -> str:
        return to_plain_text(render_tuning(self.report))

    def save_pretrained(
        self,
        output_dir: str | Path,
        *,
        overwrite: bool = False,
        lock: OutputLock | None = None,
        verify: bool = False,
    ) -> Path:
        """Publish the whole folder at once: weights, tokenizer, card, recipe and report.

        Args:
            output_dir: a folder that is not there yet.
            overwrite: replace it if it is there, and holds only what eckart has published there. What the run has read
                is never replaced.
            lock: the lock on the folder, if the caller holds it.
            verify: let a fresh process read the folder back before it is put in place.

        Returns:
            The published folder.

        Raises:
            CheckpointError: if it cannot be published; then nothing is.
        """
        source = self.source_folder
        if source is not None and self.report["new_head"] and (source / "modules.json").exists():
            source = None  # a classifier is not a sentence-transformers model
        loading = find_loading(self.model, source)
        origin = origin_of(self.source_folder, same_task=not self.report["new_head"])
        forms = sorted({spec["form"] for spec in described(self.model).values()})
        card = render_model_card(
            Path(output_dir).name,
            base_model=self.recipe.model or getattr(self.model.config, "name_or_path", None) or None,
            loading=loading,
            method=_in_words(self.recipe.recovery, self.report["recovery_settings"], kept=self.report["kept"]),
            form=", ".join(forms) or "dense",
            about=[f"It does less for easy inputs: {line}." for line in in_words(self.model)],
            **_words_of_whole(self.model),
            measured=list_tuning_card_rows(self.report),
            results=list_results(
                self.report["scores"][self.report["kept"]],
                *_scored_on(self.recipe, self.report["data"]),
                origin.get("pipeline_tag") or loading.task,
            ),
            **origin,
        )
        name = Path(output_dir).name
        page = render_or_warn(self.report, name, loading=loading.lines(name), again=make_again(self.report, name))
        self.folder = save(
            self.model, output_dir, tokenizer=self.tokenizer, source_folder=source,
            recipe_yaml=self.recipe.to_yaml(), plan=_plan(self.source_folder), report=self.report, report_html=page,
            card=card,
            inputs=self.recipe.inputs, overwrite=overwrite, lock=lock, verify=verify,
            trust_remote_code=self.recipe.trust_remote_code,
        )  # fmt: skip
        return self.folder

    def push_to_hub(self, name: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Push the model to the hub: see :meth:`eckart.compression.result.Result.push_to_hub`."""
        folder = self.folder
        try:
            return push_result(self.save_pretrained, folder, name, private=private, token=token)
        finally:
            self.folder = folder


def choose_better(
    student: Student,
    trained: PreTrainedModel,
    recovery: Recovery,
    scorer: Scorer,
    before: Scores,
    after: Scores,
    notes: list[str],
) -> tuple[PreTrainedModel, str]:
    """The model to publish, "after" or "before"; a smaller model that was asked for is published whatever it scores."""
    worse = not is_better(scorer, after, before)
    name = scorer.criterion
    found = f"{before.numbers[name]:.4g} before, {after.numbers[name]:.4g}"
    kept, when = trained, "after"
    if worse and recovery.shrinks:
        notes.append(f"{name} {found} in the smaller model that was asked for")
    elif worse:
        how = "did not make it better beyond chance" if after.right else "made it worse"
        notes.append(
            f"recovery {recovery.name or type(recovery).__name__} {how} ({name} {found} after): the model before it is "
            f"kept. {recovery.remedy}"
        )
        kept, when = student.own_model(), "before"
    if kept is trained:
        cast(kept, student.dtype)
    if shared_parameters(kept) or behaviors_of(kept):
        attach_config(kept)  # or `save_pretrained` would leave out what is shared, and how the model behaves
    return kept.eval(), when


def make_report(
    recipe: TuneRecipe,
    recovery: Recovery,
    student: Student,
    data: TrainingData,
    scores: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """What was asked and measured, as JSON values."""
    return {
        "format_version": 1,
        "kind": "tune",
        "model": type(student.model).__name__,
        "recipe": recipe.model_dump(mode="json"),
        "recovery": recipe.recovery,
        "recovery_settings": json.loads(json.dumps(settings_of(recovery), default=str)),
        "paper": recovery.paper,
        "task": student.task,
        "device": str(device),
        "data": data.description | data.digests,
        "new_head": student.new_head,
        "recovered_by": recovery.report(),
        "protocol": data.scorer.protocol,
        "criterion": data.scorer.criterion,
        "scores": scores,
    }


class Clock:
    """Seconds by the name of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = round(self.seconds.get(step, 0.0) + time.perf_counter() - start, 2)


def _in_words(name: str, settings: dict[str, Any], *, kept: str) -> str:
    words = ", ".join(f"{key}={value}" for key, value in settings.items() if value not in (None, ""))
    tried = f"recovery {name}{f' ({words})' if words else ''}"
    return tried if kept == "after" else f"none: {tried} was tried, and this is the model before, which was better"


def _words_of_whole(model: PreTrainedModel) -> dict[str, str]:
    """What the card says of a model without factors that does less for easy inputs."""
    if not behaviors_of(model) or is_factored(model):
        return {}
    return {
        "summary": "which does less for easy inputs with eckart",
        "notice": "`pip install eckart` is needed: transformers without it says so, and runs the whole model for every "
        "input. `eckart export --drop-adaptive` makes a copy of the whole model that loads anywhere.",
    }  # fmt: skip


def _scored_on(recipe: TuneRecipe, data: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """What the scores are of: a description of data as in the report, and which part of them."""
    if recipe.eval_data is None:
        return data, "held-out part"
    hub = {} if Path(recipe.eval_data).exists() else {"config": recipe.data_config, "split": recipe.eval_split}
    return {"source": recipe.eval_data} | hub, None


def _plan(folder: Path | None) -> dict[str, Any] | None:
    """The plan that the factors were made by, which training does not change."""
    file = folder / "eckart" / "plan.json" if folder is not None else None
    if file is None or not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else None
