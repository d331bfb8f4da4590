"""Several methods at several sizes, side by side: the data is read and run through the model once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eckart.compression.announce_training import announce_training
from eckart.compression.baselines import measure_baselines
from eckart.compression.context import Timer
from eckart.compression.open_run import keep_unchanged, open_in_memory
from eckart.compression.options import combine_options
from eckart.compression.outlook import announce_comparison, name_run
from eckart.compression.pipeline import build_model, make_factors
from eckart.compression.prepare import prepare
from eckart.compression.recipe import Recipe
from eckart.compression.result import Result
from eckart.compression.rounding import round_dense
from eckart.compression.settings import Settings
from eckart.data import require_data
from eckart.errors import UsageError
from eckart.methods import Method, method_named
from eckart.quantization import require_torchao
from eckart.report.compression import list_quality
from eckart.storage.store import MemoryStore

logger = logging.getLogger(__name__)

OWN_STEPS = ("factorization", "curves", "replacement", "refit", "refinement", "distillation", "quantization")
"""Steps that each method takes by itself; their seconds stand in its row."""

MEASURING = ("measuring", "latency")
"""Steps that are no part of a compression."""


class Comparison:
    """The results of a comparison, made one after another while it is iterated: `(method, keep, result)`.

    Drop a result before taking the next one to hold one compressed model in memory.

    Attributes:
        rows: one for each result that was made: `method`, `keep`, `of_sites`, `of_model`, `elements`, `bytes`,
            `multiply_adds`, `quality` on held-out text, `latency` beside the original's, `seconds` of the method's own
            steps.
        original: sizes of the original; empty before the first result.
        original_rounded: with `quantize`, what the original becomes where it is rounded the same way and not factored:
            `kind`, sizes, `quality`, `latency`; None without.
        baselines: the original rounded to int8 and int4, simulated: `name`, sizes and `quality` of each.
        notes: what is odd about the checkpoint, and the seconds of the steps that all methods share.
    """

    def __init__(
        self,
        results: Iterator[tuple[str, float, Result]],
        warnings: Sequence[str],
        round_original: Callable[[], dict[str, Any] | None] = lambda: None,
        measure_baselines: Callable[[], list[dict[str, Any]]] = list,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self.original: dict[str, int] = {}
        self.original_rounded: dict[str, Any] | None = None
        self.baselines: list[dict[str, Any]] = []
        self._round_original = round_original
        self._measure_baselines = measure_baselines
        self.notes: list[str] = list(warnings)
        self._results = results
        self._shared: dict[str, float] = {}

    def __iter__(self) -> Iterator[tuple[str, float, Result]]:
        for method, keep, result in self._results:
            if not self.rows:
                self.original_rounded = self._round_original()
                self.baselines = self._measure_baselines()
            self._add_row(method, keep, result)
            yield method, keep, result

    def as_dict(self) -> dict[str, Any]:
        """Make what is left of the results; `rows`, `original`, `original_rounded` and `notes` as JSON values."""
        for _ in self:
            pass
        steps = ", ".join(f"{step} {value:.1f} s" for step, value in self._shared.items())
        shared = [f"seconds are those of factoring alone; shared by all methods: {steps}"] if steps else []
        return {
            "rows": self.rows,
            "original": self.original,
            **({"original_rounded": self.original_rounded} if self.original_rounded is not None else {}),
            **({"baselines": self.baselines} if self.baselines else {}),
            "notes": [*self.notes, *shared],
        }

    def _add_row(self, method: str, keep: float, result: Result) -> None:
        report, seconds = result.report, result.report["seconds"]
        self.original = report["sizes"]["model"]["before"]
        self._shared = {step: value for step, value in seconds.items() if step not in (*OWN_STEPS, *MEASURING)}
        self.rows.append(
            {
                "method": method,
                "keep": keep,
                "of_sites": report["kept"]["of_sites"],
                "of_model": report["kept"]["of_model"],
                **report["sizes"]["model"]["after"],
                "quality": list_quality(report),
                **_before_rounding(report),
                "latency": report.get("latency"),
                "seconds": round(sum(seconds.get(step, 0.0) for step in OWN_STEPS), 2),
            }
        )


def _before_rounding(report: dict[str, Any]) -> dict[str, Any]:
    """How a result was rounded, and what it was before; nothing for one in floating point."""
    rounding = report.get("quantization")
    if rounding is None:
        return {}
    before = rounding["before"]
    quality = list_quality({"quality": before["quality"]})
    return {"rounded": rounding["kind"], "before_rounding": {**before["size"], "quality": quality}}


def compare(
    model: PreTrainedModel | str | Path | None = None,
    tokenizer: Any = None,
    *,
    methods: Sequence[str | Method],
    keeps: Sequence[float],
    data: Any = None,
    form: str | type | None = None,
    recipe: Recipe | None = None,
    source_folder: str | Path | None = None,
    report_progress: Callable[[str], None] = logger.info,
    **options: Any,
) -> Comparison:
    """Compress a model by several methods at several sizes; nothing is published.

    Args:
        model: as for :func:`eckart.compress`; it is held in memory.
        tokenizer: as for :func:`eckart.compress`.
        methods: names, or methods of your own.
        keeps: fractions that are stored afterwards.
        data: as for :func:`eckart.compress`.
        form: as for :func:`eckart.compress`.
        recipe: everything but method and keep.
        source_folder: as for :func:`eckart.compress`.
        report_progress: as for :func:`eckart.compress`.
        **options: as for :func:`eckart.compress`.

    Returns:
        The comparison; iterate it for the results, or take its numbers by `as_dict()`.

    Raises:
        EckartError: naming what failed.
    """
    methods, keeps = list(methods), list(keeps)
    if not methods or not keeps:
        raise UsageError("methods, keeps: name one of each at least, such as methods=['svd', 'drone'], keeps=[0.7].")
    recipe = combine_options(recipe, options, model=model, data=data, form=form, where="eckart.compare")
    recipes = [combine_options(recipe, {}, method=method, where="methods") for method in methods]
    for keep in keeps:
        combine_options(recipe, {"keep": keep}, where="keeps")
    if recipe.rounds > 1:
        raise UsageError(
            f"--rounds {recipe.rounds}: the rows of a comparison share the statistics of one model. Leave it out, or "
            "use `eckart compress` for each row."
        )
    if recipe.quantize is not None:
        require_torchao()
    require_data(data, recipe.data)
    rows = [Settings.of(method_named(each.method), each) for each in recipes]

    with keep_unchanged(model):
        run = open_in_memory(
            model, tokenizer, data, recipe, rows, source_folder=source_folder, report_progress=report_progress
        )
        context = prepare(run, data, rows, keeps)
        rows = [announce_training(context, row, recipe, report_progress) for row in rows]
        outlook = announce_comparison(context, rows, keeps, recipe, report_progress)

    def results() -> Iterator[tuple[str, float, Result]]:
        with outlook:
            yield from runs()

    def runs() -> Iterator[tuple[str, float, Result]]:
        outlook.enter("statistics")
        with keep_unchanged(model):
            windows = list(context.timer.gathering(context.calibration.windows()))
        shared = context.timer.seconds
        for row in rows:
            settings = context.adapt_settings(row)
            asked = run.recipe.model_copy(
                update={"method": settings.method.name, "latency": recipe.latency is not False}
            )
            context.timer = Timer(shared)
            context.workspace.store = MemoryStore()
            outlook.enter(name_run(row, keeps[0]))
            with keep_unchanged(model):
                factors = make_factors(context, settings, asked, max(keeps), windows)
            own = context.timer.seconds
            for keep in keeps:
                outlook.enter(name_run(row, keep))
                context.timer = Timer(own)
                context.workspace.store = MemoryStore()  # the factors stay in theirs
                with keep_unchanged(model):
                    result = build_model(context, settings, asked.model_copy(update={"keep": keep}), factors)
                yield settings.method.name, keep, result

    def round_original() -> dict[str, Any] | None:
        if recipe.quantize is None:
            return None
        with keep_unchanged(model):
            return round_dense(context, recipe.quantize, timed=recipe.latency is not False)

    def rounded() -> list[dict[str, Any]]:
        outlook.enter("rounded originals")
        with keep_unchanged(model):
            return measure_baselines(context)

    return Comparison(results(), context.warnings, round_original, rounded)
