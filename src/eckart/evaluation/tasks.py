"""Scores on labeled tasks: classifiers, regression heads and sentence embeddings."""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from eckart.config import DEFAULT_TOKENS
from eckart.data.batch import Batch, padding_share
from eckart.data.examples import TextExample
from eckart.data.explain import require_known_tokens
from eckart.data.inference import evaluating, progress, run
from eckart.data.model_kind import UNLIMITED, head_problem, max_positions, pad_token, sequence_length
from eckart.data.padding import encoder_batches
from eckart.data.pooling import Pooling
from eckart.data.task import TaskData
from eckart.errors import DataError, UsageError
from eckart.evaluation.agreement import embed_sentences
from eckart.moments import run_in_halves

NO_ANSWER = -1
"""The class of a row whose logits are not finite."""


def score_classification(
    model: nn.Module,
    tokenizer: Any,
    task: TaskData,
    *,
    batch_size: int = 32,
    max_seq_length: int | None = None,
    disable: bool | None = None,
) -> dict[str, Any]:
    """Score a classifier.

    Args:
        model: A model with a classification head.
        tokenizer: Its tokenizer.
        task: Texts with class numbers.
        batch_size: Texts at once.
        max_seq_length: Tokens a text; None for 512 or as many as the model has positions for.
        disable: No progress bar.

    Returns:
        `accuracy`; `f1` (of class 1 for two classes, else the macro mean); `f1_macro`; `matthews`; `rows`;
        `right`: for each row, in the task's order, whether it was; `finite`, and `nonfinite_rows`: rows whose logits
        are not finite count as wrong, never skipped; `padding`: which part of the tokens that were computed is none.
        Where several classes may hold at once, `accuracy` counts the rows with all of them right, `f1` and `matthews`
        are over all classes of all rows together.

    Raises:
        UsageError: If the model has no classification head.
        DataError: If a label is not a class of the model.
    """
    logits, padding = _head_logits(model, tokenizer, task, batch_size, max_seq_length, disable)  # (N, C)
    classes = logits.shape[1]
    if head_problem(model) == "multi_label_classification":
        return _score_label_sets(logits, task) | {"padding": padding}
    if classes == 1:
        raise UsageError(f"{type(model).__name__} has one output: score it with `regression`")
    gold = []
    for row in task:
        label = row.label
        if isinstance(label, list) or label != int(label) or not 0 <= label < classes:
            raise DataError(f"{row.text.where}: label {label} is not a class of the model's {classes}: correct it")
        gold.append(int(label))
    finite = torch.isfinite(logits).all(-1)
    predicted = torch.where(finite, logits.argmax(-1), NO_ANSWER).tolist()
    return {
        **_classification_scores(gold, predicted, classes),
        "rows": len(gold),
        "right": [guess == truth for guess, truth in zip(predicted, gold, strict=True)],
        "finite": bool(finite.all()),
        "nonfinite_rows": int((~finite).sum()),
        "padding": padding,
    }


def score_regression(
    model: nn.Module,
    tokenizer: Any,
    task: TaskData,
    *,
    batch_size: int = 32,
    max_seq_length: int | None = None,
    disable: bool | None = None,
) -> dict[str, Any]:
    """Score a model that gives scores against gold scores.

    Args:
        model: A model with a regression head.
        tokenizer: Its tokenizer.
        task: Texts with scores.
        batch_size: Texts at once.
        max_seq_length: Tokens a text; None for 512 or as many as the model has positions for.
        disable: No progress bar.

    Returns:
        `spearman`; `pearson`; `rows`; `finite`; `padding`. Of several scores a row, the means over the scores.

    Raises:
        UsageError: If the model gives classes.
    """
    logits, padding = _head_logits(model, tokenizer, task, batch_size, max_seq_length, disable)
    if logits.shape[1] != 1 and head_problem(model) != "regression":
        raise UsageError(f"{type(model).__name__} has {logits.shape[1]} outputs: score it with `classification`")
    gold = torch.tensor(task.labels, dtype=torch.float64).reshape(len(task), -1)
    if gold.shape != logits.shape:
        raise DataError(
            f"{task.rows[0].text.where}: {gold.shape[1]} scores a row, but {type(model).__name__} gives "
            f"{logits.shape[1]}: give as many"
        )
    found = [correlations(logits[:, i], gold[:, i]) for i in range(logits.shape[1])]
    means = {name: math.fsum(one[name] for one in found) / len(found) for name in ("spearman", "pearson")}
    return {**means, "rows": len(task), "finite": all(one["finite"] for one in found), "padding": padding}


def score_similarity(
    model: nn.Module,
    tokenizer: Any,
    task: TaskData,
    pooling: Pooling | None = None,
    *,
    batch_size: int = 32,
    max_seq_length: int | None = None,
    disable: bool | None = None,
) -> dict[str, Any]:
    """Score sentence embeddings: the cosine of each pair against its gold score.

    Args:
        model: A model that puts out token embeddings; a head on it is left out.
        tokenizer: Its tokenizer.
        task: Pairs of sentences with scores.
        pooling: How tokens become a sentence; None for the mean over real tokens.
        batch_size: Sentences at once.
        max_seq_length: Tokens a sentence; None for what the pooling or the tokenizer says, of a model without either
            512 or as many as it has positions for.
        disable: No progress bar.

    Returns:
        `spearman`; `pearson`; `rows`; `finite`: False where an embedding is not, and the scores are NaN; `padding`.

    Raises:
        DataError: If a row has no second sentence.
    """
    sentences: dict[str, int] = {}
    pairs = []
    for row in task:
        if row.text.pair is None:
            raise DataError(f"{row.text.where}: no second sentence: name its column (--data-target-column)")
        pairs.append(tuple(sentences.setdefault(text, len(sentences)) for text in (row.text.text, row.text.pair)))
    texts = [
        TextExample(text if pooling is None else pooling.text(text), "sentence", index)
        for text, index in sentences.items()
    ]
    found: dict[int, Tensor] = {}
    with evaluating(model):
        batches = _batches(model, tokenizer, texts, batch_size, max_seq_length, pooling)
        shown = progress(batches, what="embeddings", disable=disable)
        for examples, rows in run_in_halves(shown, lambda part: (part.examples, embed_sentences(model, part, pooling))):
            found |= dict(zip(examples, rows, strict=True))
    first = torch.stack([found[one] for one, _ in pairs])
    second = torch.stack([found[two] for _, two in pairs])
    gold = torch.tensor(task.labels, dtype=torch.float64)
    found_scores = correlations(torch.nn.functional.cosine_similarity(first, second, dim=-1), gold)
    return found_scores | {"padding": padding_share(batches)}


def _classification_scores(gold: list[int], predicted: list[int], classes: int) -> dict[str, float]:
    """Accuracy, F1 and Matthews; a prediction that is not a class is wrong and counts for no class."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    def mean_f1(labels: list[int]) -> float:
        return float(f1_score(gold, predicted, labels=labels, average="macro", zero_division=0))

    macro = mean_f1(sorted({*gold, *predicted} - {NO_ANSWER}))
    return {
        "accuracy": float(accuracy_score(gold, predicted)),
        "f1": mean_f1([1]) if classes == 2 else macro,
        "f1_macro": macro,
        "matthews": float(matthews_corrcoef(gold, predicted)) if len({*gold, *predicted}) > 1 else 0.0,
    }


def _score_label_sets(logits: Tensor, task: TaskData) -> dict[str, Any]:
    """Scores where several classes may hold at once; what is not finite holds none and is wrong."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    for row in task:
        if not isinstance(row.label, list) or len(row.label) != logits.shape[1]:
            raise DataError(
                f"{row.text.where}: label {row.label} is not a list of {logits.shape[1]} numbers: this head holds "
                "several labels at once"
            )
    gold = torch.tensor(task.labels).bool()
    finite = torch.isfinite(logits).all(-1)
    predicted = (logits > 0) & finite[:, None]
    right = ((predicted == gold).all(-1) & finite).tolist()
    both = gold.numpy(), predicted.numpy()
    flat = both[0].ravel(), both[1].ravel()
    return {
        "accuracy": sum(right) / len(right),
        "f1": float(f1_score(*both, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(*both, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(*flat)) if len({*flat[0].tolist(), *flat[1].tolist()}) > 1 else 0.0,
        "rows": len(right),
        "right": right,
        "finite": bool(finite.all()),
        "nonfinite_rows": int((~finite).sum()),
    }


def correlations(predicted: Tensor, gold_scores: Tensor) -> dict[str, Any]:
    """Spearman and Pearson correlation with the gold scores; NaN where a side is constant or not finite."""
    from scipy.stats import pearsonr, spearmanr

    given, gold = predicted.double().cpu().numpy(), gold_scores.numpy()
    finite = bool(numpy.isfinite(given).all() and numpy.isfinite(gold).all())
    defined = finite and all(len(set(side.tolist())) > 1 for side in (given, gold))
    return {
        "spearman": float(spearmanr(given, gold).statistic) if defined else math.nan,
        "pearson": float(pearsonr(given, gold).statistic) if defined else math.nan,
        "rows": len(gold),
        "finite": finite,
    }


def _head_logits(
    model: nn.Module, tokenizer: Any, task: TaskData, batch_size: int, max_seq_length: int | None, disable: bool | None
) -> tuple[Tensor, float]:
    """Return the logits of all rows (N, C), in the task's order, and which part of the tokens was padding."""
    found: dict[int, Tensor] = {}
    # A row's place in the task, not in the data, as what it is known by: rows may come from several files.
    texts = [TextExample(row.text.text, row.text.where, place, pair=row.text.pair) for place, row in enumerate(task)]

    def answer(batch: Batch) -> dict[int, Tensor]:
        logits = getattr(run(model, batch.inputs), "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise UsageError(
                f"{type(model).__name__} gives no logits a text: load it with AutoModelForSequenceClassification"
            )
        return dict(zip(batch.examples, logits.double().cpu(), strict=True))

    with evaluating(model):
        batches = _batches(model, tokenizer, texts, batch_size, max_seq_length)
        for answers in run_in_halves(progress(batches, what="task", disable=disable), answer):
            found |= answers
    return torch.stack([found[place] for place in range(len(task))]), padding_share(batches)


def _batches(
    model: nn.Module,
    tokenizer: Any,
    texts: list[TextExample],
    batch_size: int,
    max_seq_length: int | None,
    pooling: Pooling | None = None,
) -> list[Batch]:
    if not texts:
        raise DataError("task: no rows to score: pass data that hold some")
    config: Any = model.config
    default = DEFAULT_TOKENS if pooling is None else pooling.max_seq_length or UNLIMITED
    length = sequence_length(max_seq_length, default, tokenizer=tokenizer, config=config, model=model)
    if pooling is not None and pooling.max_seq_length is not None and max_seq_length is None:
        length = min(pooling.max_seq_length, max_positions(config, model) or pooling.max_seq_length)
    pad_id = pad_token(tokenizer, config)
    batches = list(encoder_batches(texts, tokenizer, max_length=length, batch_size=batch_size, pad_id=pad_id))
    require_known_tokens(batches, model, config, tokenizer)
    return batches
