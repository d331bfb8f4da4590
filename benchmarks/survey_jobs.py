"""What the survey does to one model, each job in a fresh process.

A process is forked from a server that has imported the libraries and read no model: it is as empty as a new
interpreter, without the seconds of importing.
"""

from __future__ import annotations

import multiprocessing
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import interleaved
from transformers import AutoTokenizer

import eckart
from eckart.checkpoint.tokenizer import load_tokenizer
from eckart.data import load_task
from eckart.evaluation.perplexity import measure_perplexity
from eckart.evaluation.rounding import round_weights
from eckart.evaluation.sizes import count_sizes
from eckart.evaluation.tasks import score_classification
from eckart.model import find_sites

BATCH, LENGTH = 32, 64
"""Rows and tokens of a batch that is timed."""


@dataclass(frozen=True)
class Task:
    """A task and the model that it begins with.

    Attributes:
        name: of the task.
        kind: "classification" or "causal".
        model: an encoder that has yet to learn it, or a language model.
        train: labeled rows or text.
        calibration: what statistics are gathered on.
        valid: what decides whether a recovery is kept; None: a tenth of what is trained on.
        held: what is scored; nothing else reads it.
        columns: of labeled rows, as options of :func:`eckart.tune`.
        batch: rows or windows of a step.
    """

    name: str
    kind: str
    model: Path
    train: Path
    calibration: Path
    valid: Path | None
    held: Path
    columns: dict[str, str]
    batch: int

    @property
    def length(self) -> int:
        """Tokens of a row or window."""
        return 128 if self.kind == "classification" else 256


def in_fresh_process(job: Callable[..., Any], *arguments: Any) -> Any:
    """The job's result; what it raises is raised here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_quietly, job, arguments).result()


def compressed(source: Path, output: Path, task: Task, options: dict[str, Any], samples: int, seed: int) -> None:
    """Compress a model, and publish it."""
    recipe = eckart.Recipe(model=str(source), **options, **_calibration(task, samples, seed))
    shutil.rmtree(output, ignore_errors=True)
    eckart.compress(recipe=recipe, output_dir=output, restart=True)


def compared(
    source: Path, output: Path, task: Task, methods: Sequence[str], keeps: Sequence[float], curvature: str,
    samples: int, seed: int,
) -> None:  # fmt: skip
    """Compress a model by several methods, on statistics that are gathered once, and publish METHOD-KEEP each."""
    recipe = eckart.Recipe(**_calibration(task, samples, seed), curvature=curvature)
    model, tokenizer = eckart.load(source, dtype=torch.float32), load_tokenizer(source)
    found = eckart.compare(model, tokenizer, methods=methods, keeps=keeps, recipe=recipe, source_folder=source)
    for method, keep, result in found:
        result.save_pretrained(output / f"{method}-{keep}", overwrite=True)


def _calibration(task: Task, samples: int, seed: int) -> dict[str, Any]:
    columns = ("data_column", "data_target_column", "data_label_column")
    named = {name: task.columns[name] for name in columns if name in task.columns}
    return {
        "data": str(task.calibration), **named, "num_samples": samples, "max_seq_length": task.length,
        "batch_size": 16, "seed": seed, "dtype": "float32",
    }  # fmt: skip


def tuned(source: Path, output: Path, task: Task, options: dict[str, Any], teacher: Path | None, steps: int) -> None:
    """Train a model, and publish it."""
    valid: dict[str, Any] = {} if task.valid is None else {"eval_data": str(task.valid)}
    valid |= {"num_samples": steps * task.batch} if options["recovery"] == "refit" else {"max_steps": steps}
    recipe = eckart.TuneRecipe(**{
        "model": str(source), "teacher": None if teacher is None else str(teacher), "task": task.kind,
        "data": str(task.train), **task.columns, **valid, "max_seq_length": task.length, "batch_size": task.batch,
        **options,
    })  # fmt: skip
    shutil.rmtree(output, ignore_errors=True)
    eckart.tune(recipe.model, recipe=recipe, output_dir=output, restart=True)


def fine_tuned(task: Task, work: Path, steps: int, seed: int) -> Path:
    """The folder of the encoder that has learned a task; it is made once."""
    folder = work / f"{task.name}-dense"
    if not folder.is_dir():
        settings = {"recovery": "full", "learning_rate": 1e-4, "seed": seed, "batch_size": 32}
        in_fresh_process(tuned, task.model, folder, task, settings, None, steps)
    return folder


def rounded(dense: Path, output: Path) -> int:
    """The model with its sites rounded to int8, saved as it computes; returns the bytes that storing int8 takes."""
    model = eckart.load(dense, dtype=torch.float32)
    quantized = round_weights(model, [site.name for site in find_sites(model).chosen], 8)
    shutil.rmtree(output, ignore_errors=True)
    quantized.model.save_pretrained(output)
    load_tokenizer(dense).save_pretrained(output)
    return int(quantized.model_bytes)


def scored(folder: Path, dense: Path, task: Task, tokens: int, repeats: int) -> dict[str, Any]:
    """Quality, size and latency of a published model.

    Returns:
        `score`: accuracy or perplexity; `elements`, `bytes` and `multiply_adds` of the whole model; `latency`:
        seconds of a batch of 32 over the dense model's, measured in turn, `repeats` times if any.
    """
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = eckart.load(folder, dtype=torch.float32).eval()
    if task.kind == "classification":
        names = {"column": "data_column", "pair_column": "data_target_column", "label": "data_label_column"}
        columns = {key: task.columns[n] for key, n in names.items() if n in task.columns}
        rows = load_task(str(task.held), **columns, num_samples=tokens // 4)
        value = score_classification(model, tokenizer, rows, max_seq_length=task.length, disable=True)["accuracy"]
    else:
        text = task.held.read_text(encoding="utf-8")
        found = measure_perplexity(model, tokenizer, text, window=task.length, max_tokens=tokens, disable=True)
        value = found["perplexity"]
    after = count_sizes(model).model
    found = {"score": value, "elements": after.elements, "bytes": after.bytes, "multiply_adds": after.multiply_adds}
    return found | ({"latency": _latency(model, dense, repeats)} if repeats else {})


def _latency(model: Any, dense: Path, repeats: int) -> float:
    other = eckart.load(dense, dtype=torch.float32).eval()
    ids = torch.randint(5, model.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        runs = {"row": lambda: model(input_ids=ids), "dense": lambda: other(input_ids=ids)}
        seconds = interleaved(runs, repeats)
    return float(seconds["row"] / seconds["dense"])


def _quietly(job: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return job(*arguments)
