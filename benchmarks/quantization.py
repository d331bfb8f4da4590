"""Dense and factored models in few bits: quality at equal bytes, and what preparing forms for rounding is worth.

    python benchmarks/quantization.py --model FOLDER --calibration calibration.txt --held held.txt
    python benchmarks/quantization.py --model FOLDER --calibration train.csv --column 0 --task dev.csv

The first table: the original and its factored copies, in floating point and rounded as `--quantize` rounds them. The
change is that of rounding alone: against the same model in floating point. Bytes of floating-point numbers are those of
the original's type. The second table: forms rounded as they are, and after `eckart.quantization.prepare`; the distance
is to the form's own model in floating point. There, activations in int8 have one scale for a token (torchao), or one
for the whole tensor and a zero point (ONNX Runtime's dynamic quantization).
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import show
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import eckart
from eckart.data import Pooling, load_task
from eckart.evaluation.perplexity import measure_perplexity
from eckart.evaluation.rounding import round_to_nearest
from eckart.evaluation.sizes import count_sizes
from eckart.evaluation.tasks import score_similarity
from eckart.model import find_sites
from eckart.quantization import KINDS, choose_layers, prepare, quantize

FORMS = ("lowrank", "joint", "pivoted", "pivoted-joint", "shared-basis", "kronecker")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--column", help="of the calibration file")
    parser.add_argument("--held", help="text that perplexity is measured on")
    parser.add_argument("--task", help="rows sentence, sentence, score, without header: Spearman instead of perplexity")
    parser.add_argument("--held-tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128, help="calibration windows, or texts")
    parser.add_argument("--keeps", default="0.6,0.4")
    parser.add_argument("--form-keep", type=float, default=0.4, help="keep of the second table")
    parser.add_argument("--forms", default=",".join(FORMS))
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    kind = AutoModel if options.task else AutoModelForCausalLM
    stored = kind.from_pretrained(options.model, dtype="auto").dtype
    model = kind.from_pretrained(options.model, dtype=torch.float32).eval()
    data: dict[str, Any] = {"data": options.calibration, "num_samples": options.windows, "batch_size": 8}
    if options.column is not None:
        data["data_column"] = options.column
    if not options.task:
        data["max_seq_length"] = options.window
    if options.task:
        task = load_task(options.task, column="0", pair_column="1", label="2")
        pooling = Pooling.from_folder(Path(options.model)) or Pooling()
        tokens = tokenizer([row.text.text for row in list(task)[:32]], padding=True, return_tensors="pt")
        name = "Spearman"
    else:
        text = Path(options.held).read_text(encoding="utf-8")
        tokens = {"input_ids": tokenizer(text[:20000], return_tensors="pt")["input_ids"][:, :1536].view(-1, 256)}
        name = "perplexity"

    def score(candidate: nn.Module) -> float:
        if options.task:
            return score_similarity(candidate, tokenizer, task, pooling)["spearman"]
        return measure_perplexity(
            candidate, tokenizer, text, window=options.window, max_tokens=options.held_tokens
        )["perplexity"]  # fmt: skip

    sites = [site.name for site in find_sites(model).chosen]
    compared = [("dense", model)]
    for keep in map(float, options.keeps.split(",")):
        result = eckart.compress(model, tokenizer, keep=keep, source_folder=options.model, **data)
        compared.append((f"keep {keep:g}", result.model))
    show(
        f"in few bits, {name}", ["model", "bytes, linear layers", "bytes", "multiply-adds", name, "change by rounding"],
        [row for title, each in compared for row in few_bits(title, each, sites, stored, score, bool(options.task))],
    )  # fmt: skip
    rows = []
    for form in options.forms.split(","):
        result = eckart.compress(
            model, tokenizer, keep=options.form_keep, form=form, method="kronecker" if form == "kronecker" else "drone",
            source_folder=options.model, **data,
        )  # fmt: skip
        rows += forms_rounded(form, result.model, tokens, causal=not options.task)
    distance = "1 - cosine" if options.task else "KL, nats"
    show(f"forms rounded, {distance} x 10,000 to their own model in floating point", ["form", *ROUNDINGS], rows)


def few_bits(
    title: str, model: nn.Module, sites: list[str], stored: torch.dtype, score: Callable[[nn.Module], float], more: bool
) -> list[list[Any]]:
    """Rows of one model: as it is, and in each kind of few bits."""
    rows: list[list[Any]] = []
    own = score(model)
    for kind in (None, *KINDS):
        rounded = copy.deepcopy(model)
        if kind is not None:
            quantize(rounded, kind)
        value = own if kind is None else score(rounded)
        size = count_sizes(rounded, sites, stored)
        change = "" if kind is None else f"{value - own:+.4f}" if more else f"{value / own - 1:+.3%}"
        label = title if kind is None else f"{title} {kind}"
        rows.append([label, size.named.bytes, size.model.bytes, size.model.multiply_adds, value, change])
    return rows


# -- forms as they are, and prepared -------------------------------------------------------------------------------


def per_token(x: Tensor) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return (x / scale).round() * scale


def per_tensor(x: Tensor) -> Tensor:
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = ((high - low) / 255).clamp_min(1e-12)
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


ROUNDINGS: dict[str, tuple[int, Callable[[Tensor], Tensor] | None]] = {
    "int8": (8, None),
    "int8, a scale a token": (8, per_token),
    "int8, a scale a tensor": (8, per_tensor),
    "int4, groups of 64": (4, None),
}
"""Bits of weights, and what is done to the inputs of every layer."""


@torch.no_grad()
def forms_rounded(form: str, model: nn.Module, tokens: Any, *, causal: bool) -> list[list[Any]]:
    """Rows of one form: rounded as it is, and after it was prepared."""
    wanted = outputs(model, tokens, causal)
    rows = []
    for prepared in (False, True):
        row: list[Any] = [f"{form}, prepared" if prepared else form]
        for bits, inputs in ROUNDINGS.values():
            rounded = copy.deepcopy(model)
            if prepared:
                prepare(rounded, "int8")
            done = set()
            for name in choose_layers(rounded, "int8")[0]:
                layer = rounded.get_submodule(name)
                conv = not isinstance(layer, nn.Linear)
                if id(layer.weight) not in done:
                    done.add(id(layer.weight))
                    weight = layer.weight.mT if conv else layer.weight
                    nearest = round_to_nearest(weight, bits)
                    layer.weight.copy_(nearest.mT if conv else nearest)
                if inputs is not None:
                    layer.register_forward_pre_hook(lambda _, given, change=inputs: (change(given[0]),))
            row.append(1e4 * distance(outputs(rounded.train().eval(), tokens, causal), wanted, causal))
        rows.append(row)
    return rows


def outputs(model: nn.Module, tokens: Any, causal: bool) -> Tensor:
    if causal:
        return torch.log_softmax(model(**tokens).logits.float(), -1)
    mask = tokens["attention_mask"][..., None]
    hidden = model(**tokens).last_hidden_state * mask
    return nn.functional.normalize(hidden.sum(1) / mask.sum(1), dim=-1)


def distance(found: Tensor, wanted: Tensor, causal: bool) -> float:
    if causal:
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())
    value = float(1 - (found * wanted).sum(-1).mean())
    return value if math.isfinite(value) else math.nan


if __name__ == "__main__":
    main()
