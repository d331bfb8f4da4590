"""Inputs that are almost right: JSON, YAML, safetensors and tables in which something was changed at random."""

from __future__ import annotations

import copy
import csv
import io
import json
import random
import shutil
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from faults_workdir import SENTENCE, Workdir

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 2**31, 2**63, 10**30, 0.0, -0.5, 0.3, 1.5, 1e308, float("nan"),
    float("inf"), "", " ", "0.5", "nan", "None", "x" * 5000, "\ud800", "\x1b[31m", "\0", "../x", "/etc/passwd",
    "/dev/zero", "../../etc", "é", "a\nb", [], {}, [[]], [None], ["a", 1], {"a": {}}, {"": 0}, [[[[[[[[0]]]]]]]],
)  # fmt: skip
"""What stands where something else was meant."""

PIECES = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b"'", b",", b":", b"\n", b"\r", b"\t", b"\\",
    b"&a ", b"*a", b"!!python/object:os.system ", b"!!float ", b"<<: *a", b"? ", b"- ", b"%YAML 9", b"---\n", b"|",
    b"#", b"NaN", b"-", b"1e999", b"\\ud800", b"null", b"true", b"yes", b"2001-99-99", b"\x80", b"\xed\xa0\x80",
    b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b" " * 3000,
)  # fmt: skip
"""What is written into the middle of a file."""

SLOW = ("objective", "speedup", "max_loss", "latency", "calibrate_curves", "epochs", "profile", "quantize")
"""Options that take long as they should; they are changed by a renamed key alone."""


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        kind: of input.
        words: of the command, without `--output-dir`.
        file: that was changed.
        publishes: whether the command publishes a folder.
        same: whether what it publishes is what it would publish undisturbed.
    """

    kind: str
    words: list[Any]
    file: Path
    publishes: bool = True
    same: bool = False


# -- changes -----------------------------------------------------------------------------------------


def change_bytes(raw: bytes, chance: random.Random) -> bytes:
    """Flip, cut, double or insert something, one to three times."""
    content = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(content) + 1)
        end = min(len(content), at + chance.choice((1, 1, 4, 40, 400)))
        what = chance.randrange(6)
        if what == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            del content[at:end]
        elif what == 2:
            content[at:at] = content[at:end]
        elif what == 3:
            del content[at:]
        else:
            content[at:at] = chance.choice(PIECES)
    return bytes(content)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something lies in a value of dictionaries and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def _holder(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def change_value(value: Any, chance: random.Random) -> Any:
    """Replace, remove, rename, exchange or add entries of a value, one to three times."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        known = list(places(value))
        if not known or chance.random() < 0.02:
            return copy.deepcopy(chance.choice(VALUES))
        path = chance.choice(known)
        holder, key = _holder(value, path), path[-1]
        what = chance.randrange(8)
        if what <= 2:
            holder[key] = copy.deepcopy(chance.choice(VALUES))
        elif what == 3 and isinstance(holder[key], int | float):
            holder[key] = chance.choice((-1, 2, 1000, 0.5)) * holder[key]
        elif what == 3:
            holder[key] = [holder[key]]
        elif what == 4:
            del holder[key]
        elif what == 5 and isinstance(holder, dict):
            name = chance.choice((f"{key}s", str(key)[:-1], f"../{key}", "__metadata__", str(key).upper(), ""))
            holder[name] = holder.pop(key)
        elif what == 6:
            other = chance.choice(known)
            holder[key] = copy.deepcopy(_holder(value, other)[other[-1]])
        elif isinstance(holder, dict):
            holder[chance.choice(("x", "quantization_config", "text_config", "0", "dtype"))] = chance.choice(VALUES)
    return value


def changed_json(value: Any, chance: random.Random) -> bytes:
    """A value as JSON, changed before or after it is written."""
    if chance.random() < 0.75:
        return json.dumps(change_value(value, chance)).encode()
    return change_bytes(json.dumps(value, indent=1).encode(), chance)


# -- kinds -------------------------------------------------------------------------------------------


def recipe(workdir: Workdir, home: Path, chance: random.Random) -> Case:
    """A run file."""
    from eckart.compression.recipe import Recipe
    from eckart.recovery.recipe import TuneRecipe

    tuning = chance.random() < 0.35
    kind: Any = TuneRecipe if tuning else Recipe
    content: dict[str, Any] = (
        {"model": str(workdir.factored), "teacher": str(workdir.causal), "max_steps": 1, "data": str(workdir.text)}
        if tuning
        else {"model": str(workdir.causal), "method": "svd", "keep": 0.5}
    )
    names = [name for name in kind.model_fields if name not in SLOW]
    for name in chance.sample(names, chance.randint(0, 3)):
        content[name] = _plausible(kind.model_fields[name], chance)
    raw = yaml.safe_dump(content).encode()
    if chance.random() < 0.3:
        raw = change_bytes(raw, chance)
    elif chance.random() < 0.7:
        raw = _as_yaml(change_value(content, chance))
    if tuning and b"max_steps: 1\n" not in raw:
        raw += b"\nmax_steps: 1\n"  # else three epochs
    file = home / "run.yaml"
    file.write_bytes(raw)
    return Case("recipe", ["tune" if tuning else "compress", "--config", file], file)


def _plausible(field: Any, chance: random.Random) -> Any:
    """A value of a field's type, or near it."""
    kinds = [field.annotation, *get_args(field.annotation)]
    choices = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    if get_origin(field.annotation) is Literal:
        choices = list(get_args(field.annotation))
    if choices:
        return chance.choice(choices)
    if bool in kinds:
        return chance.choice((True, False))
    if float in kinds:
        return chance.choice((0.3, 0.7, 1, 1.0, 1e-9))
    if int in kinds:
        return chance.choice((1, 2, 3, 8))
    if any(isinstance(kind, types.GenericAlias) for kind in kinds):
        return chance.choice((["*proj"], "*mlp*", ["re:("], ["["]))
    return chance.choice(("svd", "drone", "eckart", "cpu", "text", "lowrank", "stdlib"))


def _as_yaml(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return json.dumps(value).encode()


def plan(workdir: Workdir, home: Path, chance: random.Random) -> Case:
    """A plan.json."""
    content = json.loads((workdir.factored / "eckart" / "plan.json").read_text())
    file = home / "plan.json"
    file.write_bytes(changed_json(content, chance))
    return Case("plan", ["compress", workdir.causal, "--method", "svd", "--plan", file], file)


def config(workdir: Workdir, home: Path, chance: random.Random) -> Case:
    """The config.json of a model, dense or factored."""
    source = chance.choice((workdir.causal, workdir.causal, workdir.classifier, workdir.factored))
    model = _copy(source, home)
    file = model / "config.json"
    file.write_bytes(changed_json(json.loads(file.read_text()), chance))
    return _reading("config", model, file, workdir.text if source == workdir.factored else None, chance)


def index(workdir: Workdir, home: Path, chance: random.Random) -> Case:
    """The index of a model in shards."""
    model = _copy(workdir.sharded, home)
    file = model / "model.safetensors.index.json"
    file.write_bytes(changed_json(json.loads(file.read_text()), chance))
    return _reading("index", model, file, None, chance)


def header(workdir: Workdir, home: Path, chance: random.Random) -> Case:
    """The header of a file of weights."""
    source = chance.choice((workdir.causal, workdir.factored))
    model = _copy(source, home)
    file = model / "model.safetensors"
    file.write_bytes(changed_tensors(file.read_bytes(), chance))
    return _reading("header", model, file, workdir.text if source == workdir.factored else None, chance)


def changed_tensors(raw: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header, or with bytes of the header changed."""
    length = int.from_bytes(raw[:8], "little")
    start, data = raw[8 : 8 + length], raw[8 + length :]
    what = chance.random()
    if what < 0.1:
        return change_bytes(raw[: 8 + length], chance) + data
    if what < 0.2:
        return chance.choice((0, 1, length - 1, length + 8, 2**40, 2**63)).to_bytes(8, "little") + raw[8:]
    if what < 0.3:
        return raw[: chance.randrange(len(raw))]
    start = changed_json(json.loads(start), chance)
    return len(start).to_bytes(8, "little") + start + data


def journal(workdir: Workdir, home: Path, chance: random.Random) -> Case:
    """A file of a run that was killed."""
    unfinished = workdir.unfinished[chance.randrange(len(workdir.unfinished))]
    partial = home / "result" / "out.partial"
    shutil.copytree(unfinished.folder, partial, dirs_exist_ok=True)
    file = chance.choice(sorted(path for path in partial.rglob("*") if path.is_file()))
    raw = file.read_bytes()
    if file.suffix == ".json" and chance.random() < 0.7:
        file.write_bytes(changed_json(json.loads(raw), chance))
    elif file.suffix == ".safetensors" and chance.random() < 0.5:
        file.write_bytes(changed_tensors(raw, chance))
    else:
        file.write_bytes(change_bytes(raw, chance))
    return Case("journal", unfinished.words, file, same=True)


def rows(workdir: Workdir, home: Path, chance: random.Random) -> Case:
    """Rows of data."""
    table = [
        {"text": SENTENCE[: chance.randrange(4, 90)], "label": chance.randrange(2), "id": number}
        for number in range(chance.choice((0, 1, 12, 12, 40)))
    ]
    if chance.random() < 0.6 and table:
        table = change_value(table, chance)
    suffix = chance.choice(("jsonl", "json", "csv", "tsv", "txt"))
    file = home / f"rows.{suffix}"
    raw = _as_file(table, suffix)
    file.write_bytes(change_bytes(raw, chance) if chance.random() < 0.5 else raw)
    few = ["--num-samples", 4, "--max-seq-length", 16]
    columns = chance.choice(([], ["--data-column", "text"], ["--data-column", "0"], ["--data-column", "label"]))
    labels = chance.choice(([], ["--data-label-column", "label"]))
    what = chance.randrange(4)
    if what == 0:
        words = ["tune", workdir.classifier, "--recovery", "full", "--max-steps", 1, "--eval-samples", 4, *few, *labels]
        return Case("rows", [*words, "--data", file, *columns], file)
    if what == 1:
        words = ["eval", workdir.causal, "--no-baselines", "--data", file, *columns, "--max-tokens", 200]
        return Case("rows", words, file, publishes=False)
    model = workdir.causal if what == 2 else workdir.classifier
    words = ["compress", model, "--method", "drone", "--allocation", "uniform", *few, "--data", file, *columns]
    return Case("rows", words + (labels if what == 3 else []), file)


def _as_file(table: Any, suffix: str) -> bytes:
    try:
        if suffix == "jsonl":
            return "\n".join(json.dumps(row) for row in table).encode()
        if suffix in ("csv", "tsv"):
            text = io.StringIO()
            names = list(table[0]) if table and isinstance(table[0], dict) else ["text"]
            writer = csv.DictWriter(text, names, delimiter="\t" if suffix == "tsv" else ",", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(table)
            return text.getvalue().encode("utf-8", "surrogatepass")
        if suffix == "txt":
            return "\n".join(str(row) for row in table).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, AttributeError, csv.Error):
        pass
    return json.dumps(table).encode()


def _copy(source: Path, home: Path) -> Path:
    return Path(shutil.copytree(source, home / "model"))


def _reading(kind: str, model: Path, file: Path, text: Path | None, chance: random.Random) -> Case:
    """A command that reads a model; `text` to score one that is factored."""
    if text is not None:
        scored = ["eval", model, "--data", text, "--no-baselines", "--max-tokens", 100, "--max-seq-length", 32]
        words = chance.choice((scored, ["export", model], ["verify", model]))
        return Case(kind, words, file, publishes=words[0] == "export")
    if chance.random() < 0.2:
        return Case(kind, ["inspect", model], file, publishes=False)
    return Case(kind, ["compress", model, "--method", "svd", "--keep", 0.5], file)


Maker = Callable[[Workdir, Path, random.Random], Case]

KINDS: dict[str, tuple[Maker, int]] = {
    "recipe": (recipe, 22),
    "plan": (plan, 18),
    "config": (config, 18),
    "index": (index, 12),
    "header": (header, 14),
    "journal": (journal, 2),
    "rows": (rows, 14),
}
"""Each kind of input, and how many of a hundred are of it."""
