"""Which task a model is scored on, and its scorer."""

from __future__ import annotations

from transformers import PreTrainedModel

from eckart.data import head_classes, model_kind
from eckart.data.model_kind import head_problem
from eckart.errors import UsageError
from eckart.evaluation.scorers.base import EvaluationContext, TaskScorer
from eckart.evaluation.scorers.comparison import AgreementScorer, EmbeddingScorer
from eckart.evaluation.scorers.harness import HarnessScorer
from eckart.evaluation.scorers.labeled import ClassificationScorer, RegressionScorer, SimilarityScorer
from eckart.evaluation.scorers.perplexity import PerplexityScorer
from eckart.model import has_output_head

ABSOLUTE = {
    "perplexity": PerplexityScorer,
    "classification": ClassificationScorer,
    "regression": RegressionScorer,
    "similarity": SimilarityScorer,
    "lm-eval": HarnessScorer,
}
COMPARING = {"agreement": AgreementScorer, "embedding": EmbeddingScorer}


def choose_task(context: EvaluationContext) -> str:
    """The task that was asked for, or the one that fits the model and the data.

    Raises:
        UsageError: if all that fits is a comparison with an original, and none is given.
    """
    if context.recipe.lm_eval is not None:
        return "lm-eval"
    if context.recipe.task is not None:
        return context.recipe.task
    model = context.model.model
    found = _choose_absolute_task(model, context)
    if found is not None:
        return found
    if context.original is None:
        raise UsageError(
            f"{type(model).__name__} is scored by comparison with the original, or on labeled rows: pass --against "
            "MODEL, or --data FILE with --data-column, --data-target-column (pairs) and --data-label-column."
        )
    return "agreement" if has_output_head(model) and context.pooling is None else "embedding"


def _choose_absolute_task(model: PreTrainedModel, context: EvaluationContext) -> str | None:
    """The task that scores the model alone; None where only a comparison fits."""
    recipe = context.recipe
    labeled = recipe.data_label_column is not None
    if "AutoModelForSequenceClassification" in head_classes(model.config, type(model)):
        if labeled or context.data is not None:
            return "regression" if head_problem(model) == "regression" else "classification"
    elif has_output_head(model) and context.pooling is None:
        return "perplexity" if model_kind(model.config, model) == "causal" else None
    elif labeled:
        return "similarity"
    return None


def build_scorer(task: str, context: EvaluationContext) -> TaskScorer:
    """The scorer of a task, with its data read.

    Raises:
        UsageError: if the task needs an original or data that is not given.
        DataError: if the data cannot be read.
    """
    if isinstance(context.data, str) and context.data == "self":
        raise UsageError("--data self: a model's own text says little of its quality. Pass a file or a data set.")
    if task == "perplexity" and (kind := model_kind(context.model.model.config, context.model.model)) != "causal":
        raise UsageError(
            f"--task perplexity: {type(context.model.model).__name__} is no causal model but of kind {kind}, and gives "
            "running text no probability. Compare it with the original: --task agreement --against MODEL."
        )
    if task in ABSOLUTE:
        return ABSOLUTE[task](context)
    if context.original is None:
        raise UsageError(f"--task {task}: it compares with the original, and there is none. Pass --against MODEL.")
    return COMPARING[task](context, context.original)
