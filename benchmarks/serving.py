"""A sentence encoder in ONNX Runtime and OpenVINO, dense and factored, in floating point and in few bits.

    python benchmarks/serving.py --model MINILM --calibration train.csv --task dev.csv

The files have columns sentence1, sentence2, score and no header. The model is compressed once in each form, exported in
each format and kind, and kept in --work. Every export is then run on one thread, all of them in turn, on one batch
without padding; what is told is processor time, which other programs on the machine change least. Spearman is that of
the graph's own sentence embeddings. OpenVINO is run in float32 and in the precision that it chooses by itself, which is
bfloat16 where the processor has units for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import markdown, show
from scipy.stats import spearmanr
from transformers import AutoTokenizer

import eckart
from eckart.data import load_task
from eckart.exports.engines.onnx import load_session as load_onnx
from eckart.exports.engines.openvino import load_session as load_openvino
from eckart.exports.pipeline import export

GRAPHS = {"onnx": "onnx/model.onnx", "openvino": "openvino/openvino_model.xml"}
COLUMNS = ["engine", "computes in", "model", "weights", "MB", "ms", "times float32 dense", "times dense of these bits",
           "times fastest dense int8", "Spearman"]  # fmt: skip


def compressed(options: argparse.Namespace, form: str) -> Path:
    """The model in a form; "default" for the method's own."""
    folder: Path = options.work / f"{form}-{options.keep}"
    if not folder.is_dir():
        eckart.compress(
            options.model, data=options.calibration, data_column="0", num_samples=options.samples, batch_size=32,
            keep=options.keep, form=None if form == "default" else form, output_dir=folder, seed=options.seed,
        )  # fmt: skip
    return folder


def exported(options: argparse.Namespace, source: Path, name: str, form: str, kind: str) -> Path:
    """A graph of it."""
    folder: Path = options.work / f"{name}-{form}-{kind}"
    if not folder.is_dir():
        export(source, folder, format=form, quantize=None if kind == "float32" else kind)
    return folder


def sessions(options: argparse.Namespace, folder: Path, form: str) -> dict[str, Any]:
    """What a graph is run with: precision -> runner."""
    file = folder / GRAPHS[form]
    if form == "onnx":
        return {"float32": load_onnx(file)}
    import openvino

    own = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    found = {"float32": load_openvino(file)}
    if options.own and own != "f32":
        found[own] = load_openvino(file, INFERENCE_PRECISION_HINT=None)
    return found


def processor_time(runners: dict[Any, Any], batch: dict[str, np.ndarray], repeats: int) -> dict[Any, float]:
    """Median milliseconds of a run; they take turns."""
    for run in runners.values():
        run(batch)
    times: dict[Any, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for name, run in runners.items():
            start = time.process_time()
            run(batch)
            times[name].append(time.process_time() - start)
    return {name: 1000 * statistics.median(found) for name, found in times.items()}


def spearman(run: Any, tokenizer: Any, task: Any) -> float:
    """Rank correlation of the cosines of embeddings with the scores of a task."""
    texts = [text for row in task.rows for text in (row.text.text, row.text.pair or "")]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[Any] = [None] * len(texts)
    for start in range(0, len(order), 32):
        places = order[start : start + 32]
        batch = tokenizer(
            [texts[i] for i in places], padding=True, truncation=True, max_length=256, return_tensors="np"
        )
        made = run({name: array.astype(np.int64) for name, array in batch.items()})["sentence_embedding"]
        for i, row in zip(places, made, strict=True):
            found[i] = row / np.linalg.norm(row)
    cosines = [float(found[2 * i] @ found[2 * i + 1]) for i in range(len(task.rows))]
    return float(spearmanr(cosines, task.labels).statistic)


def where_time_goes(file: Path, batch: dict[str, np.ndarray], work: Path) -> list[tuple[str, int, float]]:
    """Operators of ONNX Runtime: name, how many, share of the time of all."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.enable_profiling = True
    settings.profile_file_prefix = str(work / "profile")
    session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    runs = 8
    for _ in range(runs):
        session.run(None, batch)
    record = Path(session.end_profiling())
    took: dict[str, float] = defaultdict(float)
    counted: dict[str, int] = defaultdict(int)
    for event in json.loads(record.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            took[event["args"]["op_name"]] += event["dur"]
            counted[event["args"]["op_name"]] += 1
    record.unlink()
    total = sum(took.values())
    return [(name, counted[name] // runs, took[name] / total) for name in sorted(took, key=took.__getitem__)[::-1][:8]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a sentence-transformers folder")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--keep", type=float, default=0.35)
    parser.add_argument("--forms", default="default,lowrank", help="of the factored models")
    parser.add_argument("--formats", default="onnx,openvino")
    parser.add_argument("--kinds", default="float32,int8,int8-dynamic,int4")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-own", dest="own", action="store_false", help="OpenVINO in float32 alone")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "eckart-serving", help="kept")
    parser.add_argument("--output", type=Path, help="also write the table as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    task = load_task(options.task, split="validation", column="0", pair_column="1", label="2")
    folders = {"dense": options.model} | {form: compressed(options, form) for form in options.forms.split(",")}
    runners: dict[tuple[str, str, str, str], Any] = {}
    sizes = {}
    for form in options.formats.split(","):
        for kind in options.kinds.split(","):
            for name, source in folders.items():
                out = exported(options, source, name, form, kind)
                size = sum(path.stat().st_size for path in (out / GRAPHS[form]).parent.iterdir()) / 1e6
                for precision, run in sessions(options, out, form).items():
                    runners[form, precision, name, kind] = run
                    sizes[form, precision, name, kind] = size
    stream = np.random.default_rng(options.seed)
    shape = (options.batch, options.length)
    batch = {"input_ids": stream.integers(1000, len(tokenizer), shape), "attention_mask": np.ones(shape, np.int64),
             "token_type_ids": np.zeros(shape, np.int64)}  # fmt: skip
    milliseconds = processor_time(runners, batch, options.repeats)
    rows = []
    for key, run in runners.items():
        form, precision, name, kind = key
        mine = milliseconds[key]
        rounded = [t for (f, _, n, k), t in milliseconds.items() if f == form and n == "dense" and k.startswith("int8")]
        rows.append([
            form, precision, name, kind, f"{sizes[key]:.1f}", f"{mine:.1f}",
            f"{milliseconds[form, 'float32', 'dense', 'float32'] / mine:.2f}",
            f"{milliseconds[form, precision, 'dense', kind] / mine:.2f}",
            f"{min(rounded) / mine:.2f}" if rounded else "-", f"{spearman(run, tokenizer, task):.4f}",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    show(f"{options.batch} x {options.length} tokens, one thread", COLUMNS, rows, options.output)
    print(markdown(COLUMNS, rows))
    if "onnx" in options.formats:
        for name in folders:
            for kind in ("float32", "int8-dynamic"):
                folder = options.work / f"{name}-onnx-{kind}"
                if folder.is_dir():
                    found = where_time_goes(folder / GRAPHS["onnx"], batch, options.work)
                    print(f"\n{name}, {kind}: " + ", ".join(f"{count} {op} {share:.0%}" for op, count, share in found))


if __name__ == "__main__":
    main()
