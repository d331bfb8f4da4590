"""A sentence encoder after every method: distance to its own embeddings, and Spearman on STS-B.

    python benchmarks/encoder_quality.py --model FOLDER --calibration train.csv --task dev.csv

The files have columns sentence1, sentence2, score and no header. Without arguments: all-MiniLM-L6-v2 and STS-B from
the hub. `--unseen FILE:COLUMN ...` names tables of other sentences than those that calibrate: the distance on them
shows what calibrating on one set costs elsewhere.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from common import show, variants_of_default
from transformers import AutoModel, AutoTokenizer

import eckart
from eckart.data import Pooling, load_data, load_task
from eckart.evaluation.agreement import compare_embeddings
from eckart.evaluation.rounding import round_weights
from eckart.evaluation.tasks import score_similarity
from eckart.methods import METHODS
from eckart.model import find_sites

REFERENCE = "drone"
UNSEEN = 512
"""Sentences of each unseen set."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a sentence-transformers folder")
    parser.add_argument("--calibration", default="sentence-transformers/stsb")
    parser.add_argument("--task", default="sentence-transformers/stsb")
    parser.add_argument("--keeps", default="0.8,0.6,0.4")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--unseen", nargs="*", default=[], help="tables of other sentences, each as FILE:COLUMN")
    parser.add_argument("--only", default="", help="rows by name, separated by semicolons; drone is always there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the table as JSON")
    options = parser.parse_args()

    from eckart.checkpoint.source import resolve

    folder = resolve(options.model or "sentence-transformers/all-MiniLM-L6-v2")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pooling = Pooling.from_folder(folder) or Pooling()
    local = Path(options.task).exists()
    first, second, score = ("0", "1", "2") if local else ("sentence1", "sentence2", "score")
    task = load_task(options.task, split="validation", column=first, pair_column=second, label=score)
    held = load_data(
        options.task, tokenizer=tokenizer, model=model, split="validation", column=first, num_samples=1500,
        batch_size=32,
    )  # fmt: skip

    unseen = [
        load_data(file, tokenizer=tokenizer, model=model, column=column, num_samples=UNSEEN, batch_size=32)
        for file, _, column in (each.rpartition(":") for each in options.unseen)
    ]

    def measured(candidate: torch.nn.Module) -> tuple[float, float, float]:
        own, *others = (
            compare_embeddings(candidate, model, data, pooling)["cosine_distance"] for data in (held, *unseen)
        )
        spearman = score_similarity(candidate, tokenizer, task, pooling)["spearman"]
        return own, sum(others) / max(1, len(others)), spearman

    methods = [*(m for m in METHODS.values() if m.name != "eckart"),
               replace(METHODS["kfac"], name="kfac, allocated", allocation="loss"),
               *variants_of_default()]  # fmt: skip
    if options.only:
        methods = [method for method in methods if method.name in (REFERENCE, *options.only.split(";"))]
    table: list[list[object]] = [["dense", 1.0, 1.0, *measured(model), "-", "-"]]
    names = [site.name for site in find_sites(model).chosen]
    elements = sum(site.elements for site in find_sites(model).chosen)
    for bits in (8, 4):
        quantized = round_weights(model, names, bits)
        share = quantized.named_bytes / (4 * elements)
        table.append([f"round to nearest, int{bits} ({share:.3f} of the bytes)", "-", "-",
                      *measured(quantized.model), "-", "-"])  # fmt: skip
    found = {}
    keeps = [float(keep) for keep in options.keeps.split(",")]
    for name, keep, result in eckart.compare(
        model,
        tokenizer,
        methods=methods,
        keeps=keeps,
        data=options.calibration,
        data_column=first,
        num_samples=options.samples,
        batch_size=32,
        seed=options.seed,
        source_folder=folder,
        target="none",
    ):
        found[name, keep] = (result.report["kept"]["of_sites"], *measured(result.model))
        print(f"{name} at {keep}: {found[name, keep]}", flush=True)
    for keep in keeps:
        _, own, other, _ = found[REFERENCE, keep]
        for method in methods:
            stored, distance, elsewhere, spearman = found[method.name, keep]
            shares = [f"{distance / own:.3f}", f"{elsewhere / other:.3f}" if unseen else "-"]
            table.append([method.name, keep, stored, distance, elsewhere, spearman, *shares])
    show(
        "sentence encoder, STS-B dev",
        [
            "method",
            "keep",
            "stored parameters",
            "1 - cosine",
            "unseen sets",
            "Spearman",
            "1 - cosine / drone",
            "unseen sets / drone",
        ],
        table,
        options.output,
    )


if __name__ == "__main__":
    main()
