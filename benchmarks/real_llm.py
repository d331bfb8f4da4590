"""A real language model after every method, at equal stored numbers of its linear layers, scored on two kinds of text.

    python benchmarks/real_llm.py --quick --text-dir FOLDER          # two cores
    python benchmarks/real_llm.py --device cuda                      # the full protocol, WikiText-2 from the hub

The model is SmolLM2-135M-Instruct out of a package (see smollm2.py), or any causal model by `--model`. It is calibrated
on WikiText-2's training text and scored on its test text, and on text of another kind, which no method has seen:
`--other` names a file, and the default is the held-out part of Python's standard library. `--text-dir` is a folder with
`train.txt` and `test.txt`; where there is only a `valid.txt`, the first 70 % of its articles calibrate and the others
are scored.

What was measured is kept in the file of `--output`: broken off and started again, the benchmark goes on with the
methods that are missing. Sizes are exact, as the papers state them (`target none`). `excess` is ln(ppl / dense ppl);
the column after it is its share of that of uniform low-rank `svd-llm` at the same keep. Seconds are those of a method's
own steps: statistics are gathered once for all rows, and stand below the table. `--quick` leaves out the rows whose
blocks are trained.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import markdown, show
from smollm2 import rebuild
from transformers import AutoModelForCausalLM, AutoTokenizer

import eckart
from eckart.compression.effort import with_effort
from eckart.data import stdlib
from eckart.evaluation.perplexity import measure_perplexity
from eckart.evaluation.rounding import round_weights
from eckart.evaluation.sizes import count_sizes
from eckart.methods import METHODS
from eckart.model import find_sites

REFERENCE = "svd-llm"
CALIBRATING = 0.7
"""Part of a text's articles that calibrates where there is one text alone."""
COLUMNS = ("method", "keep", "numbers", "MB", "multiply-adds", "ppl", "excess", REFERENCE, "other text", "seconds")


@dataclass(frozen=True)
class Protocol:
    """How much text calibrates and scores.

    Attributes:
        windows: of calibration.
        window: tokens of each, and of the windows that are scored.
        scored: tokens of each text that are scored at most; None: all.
        at_once: windows that run together.
        keeps: sizes, separated by commas.
        trains: whether there are rows whose blocks are trained.
    """

    windows: int
    window: int
    scored: int | None
    at_once: int
    keeps: str
    trains: bool


FULL = Protocol(windows=128, window=2048, scored=None, at_once=8, keeps="0.8,0.6,0.4", trains=True)
QUICK = Protocol(windows=32, window=512, scored=4096, at_once=4, keeps="0.6", trains=False)


def rows() -> list[Any]:
    """The methods of the table, in its order."""
    kfac, aa_svd, default = METHODS["kfac"], METHODS["aa-svd"], METHODS["eckart"]
    size = replace(default, name="eckart, --optimise size", form=default.smallest_form or default.form)
    return [
        METHODS[REFERENCE],
        *(METHODS[name] for name in ("svd", "fwsvd", "drone", "kfac", "modegpt")),
        replace(aa_svd, name="aa-svd, closed form alone", refined=False),
        aa_svd,
        replace(kfac, name="kfac, loss allocation", allocation="loss"),
        METHODS["lems"],
        *(variant for each in (default, size) for variant in with_stages(each)),
    ]


def with_stages(method: Any) -> list[Any]:
    """A method, with measured curves, with the stages of the best effort, without its distillation, and with curves."""
    best = with_effort(replace(method, name=f"{method.name} --effort best"), "best")
    blocks = replace(best, name=f"{best.name} --no-distil", distilled=False)
    curved = (
        replace(each, name=f"{each.name} --calibrate-curves", calibrated_curves=True) for each in (method, blocks)
    )
    return [method, best, blocks, *curved]


def read_texts(folder: Path | None) -> tuple[str, str]:
    """WikiText-2 to calibrate on, and to score."""
    if folder is None:
        from datasets import load_dataset

        read = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
        return "".join(read["train"]["text"]), "".join(read["test"]["text"])
    train, test = folder / "train.txt", folder / "test.txt"
    if train.exists() and test.exists():
        return train.read_text(encoding="utf-8"), test.read_text(encoding="utf-8")
    articles = split_articles((folder / "valid.txt").read_text(encoding="utf-8"))
    number = round(CALIBRATING * len(articles))
    return "".join(articles[:number]), "".join(articles[number:])


def split_articles(text: str) -> list[str]:
    """Articles of WikiText, which start with ` = Title = `; sections have more signs."""
    articles: list[str] = [""]
    for line in text.splitlines(keepends=True):
        words = line.split()
        if len(words) > 2 and words[0] == words[-1] == "=" and "=" not in words[1:-1]:
            articles.append("")
        articles[-1] += line
    return [article for article in articles if article.strip()]


def read_other(file: Path | None) -> str:
    """Text of another kind."""
    if file is not None:
        return file.read_text(encoding="utf-8", errors="replace")
    return "\n".join(text for _, text in stdlib.documents("held"))


class Scores:
    """Perplexities of models on both texts."""

    def __init__(self, tokenizer: Any, texts: Iterable[str], protocol: Protocol) -> None:
        self.tokenizer, self.texts, self.protocol = tokenizer, tuple(texts), protocol

    def of(self, model: Any) -> tuple[float, float]:
        """Negative log-likelihood a token, in nats."""
        options = {"window": self.protocol.window, "max_tokens": self.protocol.scored, "batch_size": 4}
        wiki, other = (measure_perplexity(model, self.tokenizer, text, **options) for text in self.texts)
        return wiki["nll_per_token"], other["nll_per_token"]


def millions(sizes: dict[str, int]) -> list[float]:
    """Stored numbers, bytes and multiply-adds a token of the whole model, in millions."""
    return [round(sizes[key] / 1e6, 1) for key in ("elements", "bytes", "multiply_adds")]


def dense_rows(model: Any, scores: Scores) -> tuple[tuple[float, float], list[list[Any]]]:
    """Scores of the dense model, and the rows of it and of its rounding to int8."""
    dense = scores.of(model)
    sizes = count_sizes(model).model.as_dict()
    table: list[list[Any]] = [["dense", 1.0, *millions(sizes), math.exp(dense[0]), 0.0, "-", 0.0, "-"]]
    start = time.perf_counter()
    rounded = round_weights(model, [site.name for site in find_sites(model).chosen], 8)
    seconds = time.perf_counter() - start
    wiki, other = scores.of(rounded.model)
    sizes["bytes"] = rounded.model_bytes
    excess = [wiki - dense[0], "-", other - dense[1]]
    table.append(["dense, int8", 1.0, *millions(sizes), math.exp(wiki), *excess, round(seconds, 1)])
    return dense, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal model; SmolLM2 out of its package otherwise")
    parser.add_argument("--work", type=Path, default=Path("real-llm"), help="folder that SmolLM2 is written to")
    parser.add_argument("--text-dir", type=Path, help="folder of train.txt and test.txt, or of valid.txt")
    parser.add_argument("--other", type=Path, help="text of another kind; Python's standard library otherwise")
    parser.add_argument("--keeps", help="separated by commas; 0.8,0.6,0.4 otherwise, with --quick 0.6")
    parser.add_argument("--only", default="", help="rows by name, separated by semicolons, made in this order")
    parser.add_argument(
        "--quick", action="store_true", help="little text, one keep, no training of blocks: 15 minutes on two cores"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="keep what is measured in this file; what is there is not repeated")
    options = parser.parse_args()

    protocol = QUICK if options.quick else FULL
    folder = options.model or rebuild(options.work / "SmolLM2-135M-Instruct")
    # The products of bfloat16 are several times as fast as those of float32, on CPUs too.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, held = read_texts(options.text_dir)
    scores = Scores(tokenizer, (held, read_other(options.other)), protocol)
    by_name = {method.name: method for method in rows()}
    usual = [method.name for method in rows() if protocol.trains or not (method.refined or method.distilled)]
    methods = [by_name[name] for name in (options.only.split(";") if options.only else usual)]

    keeps = [float(keep) for keep in (options.keeps or protocol.keeps).split(",")]
    title = (
        f"{Path(folder).name}: {protocol.windows} x {protocol.window} tokens calibrate, seed {options.seed}; numbers, "
        "MB and multiply-adds a token are the whole model's, in millions"
    )
    known = read_results(options.output, title)
    if not known:
        known["dense"], known["rows"] = dense_rows(model, scores)
    dense, table = known["dense"], known["rows"]
    print(markdown(COLUMNS, table), flush=True)
    there = {tuple(row[:2]) for row in table}
    missing = [method for method in methods if any((method.name, keep) not in there for keep in keeps)]
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "calibration.txt"
        file.write_text(calibration, encoding="utf-8")
        if missing:
            comparison = eckart.compare(
                model,
                tokenizer,
                methods=missing,
                keeps=keeps,
                data=str(file),
                num_samples=protocol.windows,
                max_seq_length=protocol.window,
                batch_size=protocol.at_once,
                seed=options.seed,
                target="none",
                latency=False,
                device=options.device,
            )
            for name, keep, result in comparison:
                wiki, other = scores.of(result.model)
                made = comparison.rows[-1]
                excess = [wiki - dense[0], "-", other - dense[1]]
                row = [name, keep, *millions(made), math.exp(wiki), *excess, made["seconds"]]
                table.append(row)
                print(markdown(COLUMNS, [row]).splitlines()[-1], flush=True)
                stages = ", ".join(
                    f"{stage['stage']} {stage['distance']:.4g}{'' if stage['kept'] else ' (not kept)'}"
                    for stage in result.report.get("stages", ())
                )
                print(f"held-out distance after {stages}" if stages else "no stage after the factors", flush=True)
                if options.output is not None:
                    content = {"title": title, "columns": COLUMNS, "dense": dense, "rows": table}
                    options.output.write_text(json.dumps(content))
            notes = comparison.as_dict()["notes"]
    in_order = with_shares(table)
    show(title, COLUMNS, in_order)
    print(markdown(COLUMNS, in_order))
    print(*notes, sep="\n")


def read_results(file: Path | None, title: str) -> dict[str, Any]:
    """What an earlier run of the same protocol has written; empty if there is none."""
    if file is None or not file.exists():
        return {}
    content: dict[str, Any] = json.loads(file.read_text())
    if content["title"] != title:
        raise SystemExit(f"{file} holds other results: {content['title']}")
    return content


def with_shares(table: list[list[Any]]) -> list[list[Any]]:
    """The rows keep by keep, with the share that each excess is of the reference's."""
    place = COLUMNS.index("excess")
    reference = {row[1]: row[place] for row in table if row[0] == REFERENCE}
    names = [row[0] for row in table if row[1] == 1] + [method.name for method in rows()]
    rows_of = sorted(table, key=lambda row: (-row[1], names.index(row[0])))
    return [
        [*row[: place + 1], f"{row[place] / reference[row[1]]:.3f}" if row[1] in reference else "-", *row[place + 2 :]]
        for row in rows_of
    ]


if __name__ == "__main__":
    main()
