"""Tasks classification, regression and similarity: scores against gold labels."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedModel

from eckart.data import TaskData, load_task
from eckart.data.columns import NoSuchColumnError
from eckart.data.model_kind import head_problem
from eckart.data.sentence_folder import why_not_embedded
from eckart.errors import DataError, UsageError
from eckart.evaluation.scorers.base import EvaluationContext, TaskScorer
from eckart.evaluation.tasks import score_classification, score_regression, score_similarity


class LabeledScorer(TaskScorer):
    """Scores against the labels of rows.

    Class attributes:
        how: what is compared with the labels, in words.
        how_together: the same of a head whose labels may hold together.
        classes: whether labels are classes; scores otherwise.
        task: its name.
        needs: what its rows hold, in words.
        columns: the options that name what they hold beside a text.
        without: what is done with text that has no labels.
    """

    task: ClassVar[str]
    needs: ClassVar[str]
    columns: ClassVar[str] = "--data-label-column"
    without: ClassVar[str] = "Text without labels: --task agreement --against MODEL."
    how: ClassVar[str] = ""
    how_together: ClassVar[str] = ""
    classes: ClassVar[bool] = False

    def __init__(self, context: EvaluationContext) -> None:
        recipe = context.recipe
        if context.data is None:
            raise UsageError(
                "--data: this task needs labeled rows, and there are none. Pass --data FILE with --data-label-column."
            )
        self.tokenizer, self.pooling = context.tokenizer, context.pooling
        self.options: dict[str, Any] = {
            "batch_size": recipe.batch_size or 32,
            "max_seq_length": recipe.max_seq_length,
        }
        problem = head_problem(context.model.model)
        self.rows = self._load(
            context.data,
            column=recipe.data_column,
            pair_column=recipe.data_target_column,
            label=recipe.data_label_column,
            label2id=getattr(context.model.model.config, "label2id", None),
            regression=not self.classes,
            multi_label=self.classes and problem == "multi_label_classification",
            outputs=context.model.model.config.num_labels if problem is not None else None,
            config=recipe.data_config,
            split=recipe.data_split or "test",
            revision=recipe.data_revision,
            num_samples=recipe.num_samples,
        )
        how = self.how_together if self.classes and problem == "multi_label_classification" else self.how
        self.how_scored = f"{len(self.rows)} rows; {how}"
        super().__init__(self.rows.description, self.how_scored)

    def _load(self, data: Any, **options: Any) -> TaskData:
        """Read the rows.

        Raises:
            DataError: they have no labels; the message says what the task needs.
        """
        try:
            return load_task(data, **options)
        except NoSuchColumnError as error:
            raise DataError(
                f"{error.source}: --task {self.task} needs {self.needs}, and of the columns that there are "
                f"({error.columns}) it cannot be told which holds it. Name them: --data-column, {self.columns}. "
                f"{self.without}"
            ) from error

    def tell_padding(self, found: dict[str, Any]) -> None:
        """Say how much was computed for nothing: rows of like length are batched together, so it is little."""
        self.protocol = f"{self.how_scored}; {found['padding']:.1%} of the tokens computed are padding"


class ClassificationScorer(LabeledScorer):
    """Accuracy, F1 and Matthews' correlation of a classifier."""

    task, needs = "classification", "texts with a class each"
    how = "F1 of class 1 for two classes, the macro mean for more"
    how_together = "accuracy of rows with all labels right, F1 over all labels"
    classes = True

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        found = score_classification(model, self.tokenizer, self.rows, **self.options)
        self.tell_padding(found)
        return {"accuracy": found["accuracy"], "F1": found["f1"], "Matthews": found["matthews"]}


class RegressionScorer(LabeledScorer):
    """Correlation of the outputs with gold scores."""

    task, needs = "regression", "texts with a gold score each"
    how = "the output of the head against the gold score"

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        found = score_regression(model, self.tokenizer, self.rows, **self.options)
        self.tell_padding(found)
        return _correlations(found)


class SimilarityScorer(LabeledScorer):
    """Correlation of the cosine of two sentence embeddings with gold scores."""

    task, needs = "similarity", "pairs of sentences with a gold score each"
    columns = "--data-target-column, --data-label-column"
    without = "Plain text needs no --task: with --against MODEL embeddings are compared with the original's."
    how = "cosine of the two embeddings against the gold score"

    def __init__(self, context: EvaluationContext) -> None:
        for opened in filter(None, (context.model, context.original)):
            reason = why_not_embedded(opened.folder) if opened.folder is not None else None
            if reason is not None:
                raise UsageError(
                    f"--task similarity: {opened.name} is a sentence-transformers model of which a part is not "
                    f"computed here ({reason}), so its score would be another model's. Score it with "
                    "sentence_transformers.SentenceTransformer itself, or compare it with its original: "
                    "--task embedding --against MODEL."
                )
        super().__init__(context)

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        found = score_similarity(model, self.tokenizer, self.rows, self.pooling, **self.options)
        self.tell_padding(found)
        return _correlations(found)


def _correlations(found: dict[str, Any]) -> dict[str, float]:
    return {"Spearman": found["spearman"], "Pearson": found["pearson"]}
