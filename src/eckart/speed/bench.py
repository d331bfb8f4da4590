"""The order of a benchmark: open the models, time them in turn at every size, say where the time goes, judge."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eckart.config import merge_recipe, resolve_device
from eckart.errors import UsageError
from eckart.model import preserve_random_state
from eckart.progress import Outlook, Stage, describe_count, describe_seconds
from eckart.speed.allowed import find_allowed
from eckart.speed.clock import Run, Timing, measure_in_turn, take_processor
from eckart.speed.kinds import add_up, find_kinds
from eckart.speed.measure_profile import name_of_device
from eckart.speed.memory import peak_bytes
from eckart.speed.module_times import time_modules
from eckart.speed.phases import phases_of, prepare, tokens_of
from eckart.speed.recipe import BenchRecipe
from eckart.speed.subjects import BASELINE, ORIGINAL, Subject, add_baselines, open_subjects
from eckart.speed.verdict import judge

logger = logging.getLogger(__name__)

EAGER, COMPILED = "eager", "compiled"
PASSES, SECONDS = 5, 2.0
"""Forward passes in which the time of every module is taken; fewer where they last longer than so many seconds."""

Models = PreTrainedModel | str | Path | Sequence[str | Path] | Mapping[str, PreTrainedModel | str | Path]


def bench(
    models: Models,
    against: PreTrainedModel | str | Path | None = None,
    *,
    recipe: BenchRecipe | None = None,
    report_progress: Callable[[str], None] = logger.info,
    **options: Any,
) -> dict[str, Any]:
    """Time models beside the original that they were made from, all in turn in this process.

    Inputs are random tokens without padding. Models in memory are not changed.

    Args:
        models: in memory, a folder or a hub name; several of the last two in a list, or any in a mapping from names.
        against: the original. Without it there are no speed-ups, and no baselines in int8.
        recipe: at which sizes, in which type, on which device.
        report_progress: told what is timed.
        **options: fields of :class:`eckart.BenchRecipe`, such as `batch_sizes=(1, 8)`; an option wins over the
            recipe's field.

    Returns:
        `device`, `device_name`, `threads`, `clock`, `torch`; `models`: of each its `name`, `role`, `dtype`, seconds to
        load it, bytes of its files and in memory; `rows`: for each phase, size, mode and model the `seconds` of one
        call (median and quartiles), `tokens_per_second`, `peak_bytes`, `speedup` over the original, what is `allowed`
        and `reached` of it; `shares`: of each kind of module in the time of a call; `verdict` and `notes`: sentences.
        All plain JSON values.

        `allowed` = t / (t - t_linear (1 - kept)): t the time of the original, t_linear the time of those of its linear
        layers that the other model made smaller, taken by hooks in passes of their own, kept the fraction of their
        multiply-adds that is left. `reached` is the speed-up as a fraction of that.

    Raises:
        EckartError: naming what cannot be read or does not fit.
    """
    recipe = merge_recipe(BenchRecipe, recipe, options, "eckart.bench")
    device = resolve_device(recipe.device)
    if recipe.clock == "processor" and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise UsageError(
            f"clock = 'processor': here {torch.get_num_threads()} threads compute on {device}, whose seconds overlap; "
            "set OMP_NUM_THREADS=1 and --device cpu, or use --clock wall."
        )
    with preserve_random_state(), torch.no_grad():
        subjects = open_subjects(_named(models, against), recipe, device)
        made, notes = add_baselines(subjects, device) if recipe.baselines else ([], [])
        if recipe.baselines and against is None:
            notes.append("no original to compare with: pass --against MODEL for speed-ups and int8")
        everything = [*subjects, *made]
        rows: list[dict[str, Any]] = []
        shares: list[dict[str, Any]] = []
        sizes = [
            {"phase": phase, "batch": batch, "length": length}
            for phase in phases_of(subjects[0].model, recipe.decode)
            for batch in recipe.batch_sizes
            for length in recipe.lengths
        ]
        with _announce(sizes, [subject.name for subject in everything], recipe, report_progress) as outlook:
            for size in sizes:
                outlook.enter(_in_words(size))
                timed, where = _time_size(everything, size, recipe, device, notes)
                rows += timed
                shares += where
    described = [{"name": s.name, "role": s.role, "dtype": s.dtype, "of": s.of, **s.facts} for s in everything]
    return {
        "device": str(device),
        "device_name": name_of_device(device),
        "threads": torch.get_num_threads(),
        "clock": recipe.clock,
        "torch": torch.__version__,
        "models": described,
        "rows": rows,
        "shares": shares,
        "verdict": judge(rows, described) if recipe.baselines else [],
        "notes": list(dict.fromkeys(notes)),
    }


def _announce(
    sizes: Sequence[Mapping[str, Any]], names: Sequence[str], recipe: BenchRecipe, report: Callable[[str], None]
) -> Outlook:
    """Say what is timed, and how long that takes at least; large inputs take longer, as the first of them show."""
    seconds = len(names) * recipe.seconds * (2 if recipe.compile else 1)
    outlook = Outlook(
        [Stage(_in_words(size), tokens_of(**size) / 1e3, seconds) for size in sizes], report, pass_seconds=0.0
    )
    report(
        f"{describe_count(len(names), 'model')} ({', '.join(names)}) at {describe_count(len(sizes), 'size')}, in turn"
    )
    report(f"{describe_seconds(seconds * len(sizes))} in all, at least")
    return outlook


def _in_words(size: Mapping[str, Any]) -> str:
    return f"{size['phase']}, {size['batch']} x {size['length']} tokens"


def _named(models: Models, against: PreTrainedModel | str | Path | None) -> list[tuple[str, Any]]:
    """The name of every model in tables: the last part of its path, or all of it where two end alike."""
    if isinstance(models, Mapping):
        named = list(models.items())
    elif isinstance(models, PreTrainedModel):
        named = [("model", models)]
    else:
        paths = [str(models)] if isinstance(models, str | Path) else [str(model) for model in models]
        ends = [Path(path).name or path for path in paths]
        named = [
            (end if ends.count(end) == 1 and end != ORIGINAL else path, path)
            for end, path in zip(ends, paths, strict=True)
        ]
    names = [name for name, _ in named]
    if not names or ORIGINAL in names or len(set(names)) < len(names):
        raise UsageError(f"models {names}: give each a name of its own, other than {ORIGINAL!r}, and one at least.")
    return [*([(ORIGINAL, against)] if against is not None else []), *named]


def _time_size(
    subjects: Sequence[Subject],
    size: Mapping[str, Any],
    recipe: BenchRecipe,
    device: torch.device,
    notes: list[str],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of one size, and where the time of the models went."""
    phase, batch, length = size["phase"], size["batch"], size["length"]
    runs: dict[str, Run] = {}
    peaks: dict[str, int | None] = {}
    for subject in subjects:
        try:
            runs[subject.name] = prepare(subject.model, phase, batch, length)
            peak = peak_bytes(subject.model, runs[subject.name], device)
            peaks[subject.name] = peak if not _is_packed(subject) else None
        except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
            if subject.role != BASELINE:
                raise
            runs.pop(subject.name, None)
            notes.append(f"{subject.name} does not run and is left out: {str(error).splitlines()[0]}")
    # They have run once already.
    timings = _measure(runs, recipe, device, warm_up=1)
    allowed: dict[str, dict[str, Any]] = {}
    shares = []
    by_name = {subject.name: subject for subject in subjects}
    original = by_name.get(ORIGINAL)
    parts: dict[str, dict[str, float]] = {}
    for subject in subjects:
        if subject.role == BASELINE:
            continue
        passes = min(PASSES, 1 + int(SECONDS / timings[subject.name].median))
        mark = time.process_time if recipe.clock == "processor" else None
        parts[subject.name] = time_modules(subject.model, runs[subject.name], repeats=passes, device=device, mark=mark)
        seconds = add_up(parts[subject.name], find_kinds(subject.model, runs[subject.name]))
        total = sum(seconds.values())
        kinds = {kind: value / total for kind, value in seconds.items()}
        shares.append({**size, "model": subject.name, "shares": kinds})
        if original is not None and subject is not original:
            found = find_allowed(original.model, subject.model, parts[ORIGINAL])
            allowed |= {subject.name: found.as_dict()} if found is not None else {}
    rows = _rows(size, EAGER, timings, peaks, allowed)
    if recipe.compile:
        compiled = _compile(subjects, size, notes)
        timings = _measure(compiled, recipe, device)
        rows += _rows(size, COMPILED, timings, {}, {})
    return rows, shares


def _measure(runs: Mapping[str, Run], recipe: BenchRecipe, device: torch.device, warm_up: int = 2) -> dict[str, Timing]:
    stopwatch = take_processor if recipe.clock == "processor" else None
    repeats, seconds = recipe.repeats, recipe.seconds
    return measure_in_turn(
        runs, repeats=repeats, min_seconds=seconds, warm_up=warm_up, device=device, stopwatch=stopwatch
    )


def _rows(
    size: Mapping[str, Any],
    mode: str,
    timings: Mapping[str, Timing],
    peaks: Mapping[str, int | None],
    allowed: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    rows = []
    dense = timings.get(ORIGINAL)
    tokens = tokens_of(size["phase"], size["batch"], size["length"])
    for name, timing in timings.items():
        speedup = dense.median / timing.median if dense is not None else None
        limit = allowed.get(name, {})
        rows.append(
            {
                **size,
                "mode": mode,
                "model": name,
                "seconds": timing.as_dict(),
                "tokens_per_second": tokens / timing.median,
                "peak_bytes": peaks.get(name),
                "speedup": speedup,
                **limit,
                "reached": speedup / limit["allowed"] if limit and speedup is not None else None,
            }
        )
    return rows


def _compile(subjects: Sequence[Subject], size: Mapping[str, Any], notes: list[str]) -> dict[str, Run]:
    """Calls of the compiled models; empty, with a note, where torch cannot compile here."""
    runs: dict[str, Run] = {}
    torch.compiler.reset()
    for subject in subjects:
        if _is_packed(subject):
            continue
        call = torch.compile(subject.model, dynamic=False)
        try:
            run = prepare(subject.model, size["phase"], size["batch"], size["length"], call)
            run()
        except Exception as error:  # whatever a compiler raises; without a C++ compiler on a CPU it cannot work
            notes.append(f"torch.compile does not work here for {subject.name}: {_first_line(error)}")
            continue
        runs[subject.name] = run
    return runs


def _is_packed(subject: Subject) -> bool:
    """Whether its weights are no tensors of the model, which none can count or compile."""
    return subject.role == BASELINE and subject.dtype == "int8"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
