"""Memory and time of compressing block by block, on blocks as wide as those of a Llama of 7B parameters.

    python benchmarks/large_model.py --work FOLDER

Two checkpoints that differ in depth alone, 4 and 8 blocks, are drawn at random once and kept in the work folder: 6 GB,
and a run takes up to 7 GB more there while it lasts. Peak memory must not follow depth, and the rest of the time does:
from the difference comes what a block takes, and from that the time of a whole model. Each run is a process of its own,
with the threads that this one would use (OMP_NUM_THREADS). What was measured is kept in results.json: broken off and
started again, the benchmark goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from common import COMPRESS, markdown, watched
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from eckart.demo.steps import MODEL as TOKENIZER

ALLOWED = 1.1
"""Peak memory of the deeper model over that of the other."""

BESIDE = 2e9
"""Bytes that a run may take beside those of the deeper checkpoint."""

WHOLE = 32
"""Blocks of the whole model."""

HEAD, CONTEXT = 128, 2048
RESIDUAL = 0.3
"""What a block adds to the stream, so that the stream stays of one size however deep the model is."""

GB = 1e9


def drawn(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, columns), bfloat16: keeps the size of what runs through it, but heeds some directions more than others."""
    scale = torch.arange(1, columns + 1)[torch.randperm(columns, generator=generator)] ** -0.5
    scale /= scale.norm()
    return torch.randn(rows, columns, generator=generator).mul_(scale).to(torch.bfloat16)


def block(index: int, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """A block's tensors; the same in a model of any depth."""
    generator = torch.Generator().manual_seed(index)
    wide, narrow = config.intermediate_size, config.hidden_size
    shapes = {f"self_attn.{name}_proj": (narrow, narrow) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (wide, narrow), "mlp.up_proj": (wide, narrow), "mlp.down_proj": (narrow, wide)}
    tensors = {f"{name}.weight": drawn(*shape, generator) for name, shape in shapes.items()}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"{name}.weight"] *= RESIDUAL
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}.weight"] = torch.ones(narrow, dtype=torch.bfloat16)
    return {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}


def outside(config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Embeddings, last norm and head."""
    generator = torch.Generator().manual_seed(2**31)
    shape = (config.vocab_size, config.hidden_size)
    return {
        "model.embed_tokens.weight": torch.randn(*shape, generator=generator).to(torch.bfloat16),
        "model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16),
        "lm_head.weight": drawn(*shape, generator),
    }


def make(folder: Path, config: LlamaConfig) -> None:
    """Write a checkpoint, with one block at a time in memory; one that is there already is left."""
    if folder.is_dir():
        return
    print(f"drawing {folder} ...", flush=True)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    count = config.num_hidden_layers + 1
    places: dict[str, str] = {}
    size = 0
    for i in range(count):
        tensors = block(i, config) if i < config.num_hidden_layers else outside(config)
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file(tensors, unfinished / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config.save_pretrained(unfinished)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint's tensors."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return int(index["metadata"]["total_size"])


def run(model: Path, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """Compress a checkpoint in a process of its own, and remove the result."""
    output = work / "output"
    for folder in (output, output.with_name("output.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    asked = {
        "method": settings["method"], "keep": settings["keep"], "data": settings["data"], "stream": "on",
        "num-samples": settings["samples"], "max-seq-length": settings["length"], "batch-size": settings["batch"],
        "cache-memory": settings["cache_memory"], "output-dir": output,
    }  # fmt: skip
    command = [*COMPRESS, model, *(word for name, value in asked.items() for word in (f"--{name}", value))]
    log = work / f"{settings['method']}-{settings['blocks']}.log"
    ran = watched(command, log, environment={**os.environ, "HF_HUB_OFFLINE": "1"})
    record: dict[str, Any] = {"settings": settings, "code": ran.code, "seconds": round(ran.seconds, 2)}
    if ran.code == 0:
        report = json.loads((output / "eckart" / "report.json").read_text())
        estimate = re.search(r"about ([\d.]+) (GB|MB) at the peak", ran.output)
        units = {"GB": 1e9, "MB": 1e6}
        record |= {
            "peak": ran.peak,
            "estimate": float(estimate[1]) * units[estimate[2]] if estimate else None,
            "steps": report["seconds"],
            "quality": report["quality"],
        }
    else:
        record["error"] = ran.last_words
    for folder in (output, output.with_name("output.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    return record


class Records:
    """What was measured, in a file: a run that was measured with the same settings need not be measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        same = [record for record in self.all if record["settings"] == settings and record["code"] == 0]
        return same[-1] if same else None

    def add(self, record: dict[str, Any]) -> None:
        self.all.append(record)
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        unfinished.write_text(json.dumps(self.all, indent=2) + "\n")
        unfinished.replace(self.path)


def words(record: dict[str, Any]) -> str:
    """A run in a line."""
    start = f"{record['settings']['method']}, {record['settings']['blocks']} blocks: {record['seconds']:.1f} s"
    if record["code"] != 0:
        return f"{start}, failed: {record['error']}"
    steps = ", ".join(f"{step} {value:.1f}" for step, value in record["steps"].items())
    return f"{start} ({steps}), {record['peak'] / GB:.2f} GB"


def held(value: float, limit: float, text: str) -> str:
    return text if value <= limit else f"{text}, above"


def column(shallow: dict[str, Any], deep: dict[str, Any], bound: float) -> dict[str, str]:
    """What one method took: row -> cell."""
    few, many = shallow["settings"]["blocks"], deep["settings"]["blocks"]
    ratio = deep["peak"] / shallow["peak"]
    each = (deep["seconds"] - shallow["seconds"]) / (many - few)
    whole = deep["seconds"] + (WHOLE - many) * each
    cells = {
        f"peak memory, {few} blocks": f"{shallow['peak'] / GB:.2f} GB",
        f"peak memory, {many} blocks": held(deep["peak"], bound, f"{deep['peak'] / GB:.2f} GB"),
        "ratio of the peaks": held(ratio, ALLOWED, f"{ratio:.3f}"),
    }
    for record in (shallow, deep):
        if record["estimate"] is not None:
            name = f"estimated before the run, {record['settings']['blocks']} blocks"
            cells[name] = f"{record['estimate'] / GB:.2f} GB"
    cells |= {
        f"seconds, {few} blocks": f"{shallow['seconds']:.1f}",
        f"seconds, {many} blocks": f"{deep['seconds']:.1f}",
        "seconds a block": f"{each:.1f}",
        f"{WHOLE} blocks would take": f"{whole / 3600:.1f} h" if whole >= 3600 else f"{whole / 60:.1f} min",
    }
    for step in dict.fromkeys((*shallow["steps"], *deep["steps"])):
        times = " and ".join(f"{record['steps'].get(step, 0.0):.1f}" for record in (shallow, deep))
        cells[f"of these {step}, {few} and {many} blocks"] = times
    return cells


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("large-model-work"), help="13 GB of room; kept")
    parser.add_argument("--methods", default="drone,kfac")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--max-seq-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--cache-memory", type=float, default=0.5, help="GB of hidden states kept in memory")
    parser.add_argument("--blocks", default="4,8", help="the two depths")
    parser.add_argument("--hidden", type=int, default=4096, help=f"a multiple of {HEAD}; less for a trial")
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--again", action="store_true", help="measure again what was measured before")
    options = parser.parse_args()
    options.depths = sorted({int(word) for word in options.blocks.split(",")})
    known = len(AutoTokenizer.from_pretrained(TOKENIZER))
    if len(options.depths) != 2 or options.depths[0] < 1:
        parser.error(f"--blocks {options.blocks}: two depths, such as 4,8")
    if options.hidden % HEAD or options.vocabulary < known:
        parser.error(f"--hidden is a multiple of {HEAD}, --vocabulary at least {known}")
    return options


def main() -> None:
    options = arguments()
    many = options.depths[-1]
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n")
    shape = {"hidden": options.hidden, "intermediate": options.intermediate, "vocabulary": options.vocabulary}
    models: dict[int, Path] = {}
    for depth in options.depths:
        models[depth] = work / "-".join(map(str, ("llama", depth, *shape.values())))
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=False,
            hidden_size=options.hidden, intermediate_size=options.intermediate, vocab_size=options.vocabulary,
            num_hidden_layers=depth, num_attention_heads=options.hidden // HEAD, max_position_embeddings=CONTEXT,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        make(models[depth], config)
    size = size_of(models[many])
    bound = size + BESIDE

    records = Records(work / "results.json")
    columns: dict[str, dict[str, str]] = {}
    for method in options.methods.split(","):
        pair: list[dict[str, Any]] = []
        for depth in options.depths:
            settings = {
                **shape, "blocks": depth, "method": method, "keep": options.keep, "data": options.data,
                "samples": options.num_samples, "length": options.max_seq_length, "batch": options.batch_size,
                "cache_memory": options.cache_memory, "threads": torch.get_num_threads(), "torch": torch.__version__,
            }  # fmt: skip
            record = None if options.again else records.find(settings)
            before = record is not None
            if record is None:
                record = run(models[depth], settings, work)
                records.add(record)
            print(words(record) + (", measured before" if before else ""), flush=True)
            pair.append(record)
        columns[method] = column(pair[0], pair[1], bound) if all(record["code"] == 0 for record in pair) else {}

    limits = {
        f"peak memory, {many} blocks": f"{bound / GB:.2f} GB (checkpoint + {BESIDE / GB:.0f} GB)",
        "ratio of the peaks": str(ALLOWED),
    }
    names = dict.fromkeys(name for cells in columns.values() for name in cells)
    rows = [
        [name, *(cells.get(name, "-") if cells else "failed" for cells in columns.values()), limits.get(name, "-")]
        for name in names
    ]
    print(
        f"\nBlocks of width {options.hidden} and {options.intermediate}, {options.num_samples} x "
        f"{options.max_seq_length} tokens, keep {options.keep}; torch {torch.__version__}, "
        f"threads: {torch.get_num_threads()}.\n"
    )
    print(markdown(["", *columns, "allowed"], rows))
    whole = size // torch.bfloat16.itemsize * torch.float32.itemsize
    print(
        f"\nLoading all of the model with {many} blocks in float32 takes {whole / GB:.2f} GB, before any work is done."
    )


if __name__ == "__main__":
    main()
