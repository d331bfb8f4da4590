"""Tasks of EleutherAI's lm-evaluation-harness (lm_eval), scored as lm_eval itself scores them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eckart.data import model_kind
from eckart.errors import DataError, UsageError
from eckart.evaluation.scorers.base import EvaluationContext, TaskScorer
from eckart.model import has_output_head

BATCH_SIZE = 8
PLAIN = "none"
"""lm_eval's name for answers that were not filtered."""


class HarnessScorer(TaskScorer):
    """Metrics of tasks of lm_eval, by the names that lm_eval gives them.

    The model in memory goes through `lm_eval.simple_evaluate`; `detail` is what it returns, without the samples.
    """

    def __init__(self, context: EvaluationContext) -> None:
        recipe = context.recipe
        assert recipe.lm_eval is not None
        model = context.model.model
        if model_kind(model.config, model) == "encoder" or not has_output_head(model):
            raise UsageError(
                f"--lm-eval: its tasks are for models that write text, and {type(model).__name__} does not. Leave it "
                "out: --data FILE scores classifiers and embeddings."
            )
        _import_harness()
        self.recipe, self.tokenizer = recipe, context.tokenizer
        names = [name.strip() for name in recipe.lm_eval.split(",") if name.strip()]
        self.manager, self.tasks = find_tasks(names, recipe.include_path)
        super().__init__({"source": ", ".join(names)})

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        """One number a metric, groups of tasks first; standard errors stand in `detail`.

        Raises:
            DataError: a data set of a task cannot be had, or lm_eval cannot score the task.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        recipe = self.recipe
        batch_size = recipe.batch_size or BATCH_SIZE
        language_model = HFLM(
            pretrained=model, tokenizer=self.tokenizer, batch_size=batch_size, max_length=recipe.max_seq_length,
            trust_remote_code=recipe.trust_remote_code,
        )  # fmt: skip
        try:
            found = simple_evaluate(
                language_model, tasks=self.tasks, task_manager=self.manager, limit=recipe.limit,
                num_fewshot=recipe.num_fewshot, apply_chat_template=recipe.apply_chat_template, batch_size=batch_size,
                log_samples=False,
            )  # fmt: skip
        except Exception as error:  # a data set, a template, a metric: each raises its own
            raise DataError(
                f"--lm-eval {recipe.lm_eval}: {type(error).__name__}: {error}. Check the names (eckart lm-eval ls "
                "tasks), --include-path and the network."
            ) from error
        assert found is not None  # of several processes only the first has results, and here is one
        self.detail = _kept(found)
        self.protocol = _describe(found)
        return list_metrics(found)


def find_tasks(names: list[str], include_path: str | None) -> tuple[Any, list[str]]:
    """The manager that knows the tasks, and their full names.

    Args:
        names: of tasks, groups or tags, with wildcards; or files that define a task.
        include_path: folder of tasks of one's own.

    Returns:
        A `TaskManager`, and what `simple_evaluate` takes as `tasks`.

    Raises:
        UsageError: a name is not known, or the folder is not there.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"--include-path {include_path}: there is no such folder. Name the one that holds the tasks.")
    files = [name for name in names if Path(name).is_file()]
    wanted = [name for name in names if name not in files]
    missing = wanted
    # Reading the thousands of tasks that lm_eval brings takes its time: they are read where a name asks for them.
    for with_all in (False, True):
        if with_all and not missing:
            break
        manager = TaskManager(include_path=include_path, include_defaults=with_all)
        missing = [name for name in wanted if not manager.match_tasks([name])]
    if missing or not names:
        raise UsageError(
            f"--lm-eval: lm_eval has no task {', '.join(missing) or 'without a name'}. `eckart lm-eval ls tasks` lists "
            "them; --include-path FOLDER adds those of your own."
        )
    return manager, [*manager.match_tasks(wanted), *files]


def list_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """Name -> number, of what `simple_evaluate` returned: "arc_easy acc_norm", "gsm8k exact_match (strict-match)"."""
    scores = {}
    for task, row in {**found.get("groups", {}), **found["results"]}.items():
        for key, value in row.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                scores[f"{task} {metric}{'' if filtered == PLAIN else f' ({filtered})'}"] = float(value)
    return scores


def _kept(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is reported of an evaluation: all numbers, and how they came about."""
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    return {key: _plain(found[key]) for key in kept if found.get(key)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if hasattr(value, "item"):  # numbers of numpy
        value = value.item()
    return value if isinstance(value, int | float | str | None) else str(value)


def _describe(found: Mapping[str, Any]) -> str:
    import lm_eval

    shots = sorted(set(found["n-shot"].values()))
    rows = sum(number["effective"] for number in found["n-samples"].values())
    tasks = len(found["n-samples"])
    few = f"examples in the prompt: {', '.join(map(str, shots))}"
    return f"lm_eval {lm_eval.__version__}: {tasks} task{'s' * (tasks > 1)}, {rows:,} rows; {few}"


def describe_errors(detail: Mapping[str, Any]) -> str | None:
    """The standard errors of the metrics, in words; None where there are none."""
    parts = []
    for task, row in {**detail.get("groups", {}), **detail["results"]}.items():
        for key, value in row.items():
            metric = key.partition(",")[0]
            if metric.endswith("_stderr") and isinstance(value, int | float) and math.isfinite(value):
                parts.append(f"{task} {metric.removesuffix('_stderr')} {value:.4f}")
    return f"standard errors: {', '.join(dict.fromkeys(parts))}" if parts else None


def _import_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UsageError("--lm-eval: it needs lm_eval, which is not installed: pip install 'eckart[eval]'") from None
