"""Forward time of the pivoted form against low-rank of equal stored parameters, both against dense.

    python benchmarks/forward_speed.py --model FOLDER

Medians of interleaved repeats, 1,024 tokens, float32 and bfloat16; single layers and a whole encoder.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from common import geometric_mean, interleaved, show
from torch import nn
from transformers import AutoModel

from eckart.forms import FORMS
from eckart.model import find_sites, replace_module

TOKENS = 1024


def rank_for(form: str, width: tuple[int, int], keep: float, multiple: int) -> int:
    """The largest multiple whose stored numbers are at most `keep` of dense."""
    rows, columns = width
    ranks = range(multiple, FORMS[form].max_rank(rows, columns) + 1, multiple)
    return max(r for r in ranks if FORMS[form].size(rows, columns, r).parameters <= keep * rows * columns)


def factored(linear: nn.Linear, form: str, keep: float, multiple: int) -> nn.Module:
    """A form of the linear's shape with random factors: time does not depend on the numbers."""
    rows, columns = linear.out_features, linear.in_features
    rank = rank_for(form, (rows, columns), keep, multiple)
    module = FORMS[form](columns, rows, rank, linear.bias is not None)
    left, right = torch.randn(rows, rank) / rank**0.5, torch.randn(rank, columns) / columns**0.5
    module.store(left, right, None if linear.bias is None else linear.bias.detach().float())
    return module.to(linear.weight.dtype).eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--widths", default="384,768,1024,2048,4096")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument(
        "--multiple", type=int, default=64, help="ranks are multiples of this, of a quarter below width 1024"
    )
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows, ratios = [], []

    def measure(name: str, dtype: torch.dtype, runs: dict, repeats: int) -> None:
        seconds = interleaved(runs, repeats)
        speedups = {form: seconds["dense"] / seconds[form] for form in ("lowrank", "pivoted")}
        ratio = speedups["pivoted"] / speedups["lowrank"]
        ratios.append(ratio)
        rows.append(
            [name, str(dtype).removeprefix("torch."), seconds["dense"] * 1e3, speedups["lowrank"], speedups["pivoted"],
             ratio]
        )  # fmt: skip
        print(rows[-1], flush=True)

    for dtype in (torch.float32, torch.bfloat16):
        for width in map(int, options.widths.split(",")):
            linear = nn.Linear(width, width).to(dtype)
            x = torch.randn(TOKENS, width).to(dtype)
            multiple = options.multiple if width >= 1024 else options.multiple // 4
            modules = {
                "dense": linear,
                **{f: factored(linear, f, options.keep, multiple) for f in ("lowrank", "pivoted")},
            }
            runs = {name: (lambda module=module, x=x: module(x)) for name, module in modules.items()}
            measure(
                f"{width} x {width}", dtype, runs, options.repeats if width < 4096 else max(5, options.repeats // 3)
            )
        from eckart.checkpoint.source import resolve

        encoder = AutoModel.from_pretrained(resolve(options.model), dtype=dtype).eval()
        tokens = torch.randint(1000, 2000, (TOKENS // 128, 128))
        models = {"dense": encoder}
        for form in ("lowrank", "pivoted"):
            models[form] = copy.deepcopy(encoder)
            for site in find_sites(encoder).chosen:
                old = encoder.get_submodule(site.name)
                assert isinstance(old, nn.Linear)
                replace_module(models[form], site.name, factored(old, form, options.keep, 8))
        runs = {name: (lambda model=model, tokens=tokens: model(tokens)) for name, model in models.items()}
        measure("whole encoder", dtype, runs, options.repeats)
    rows.append(["geometric mean", "", "", "", "", geometric_mean(ratios)])
    rows.append(["smallest", "", "", "", "", min(ratios)])
    show(
        f"forward time at keep {options.keep}, {TOKENS} tokens: speed-up over dense",
        ["layer", "dtype", "dense ms", "low-rank", "pivoted", "pivoted / low-rank"],
        rows,
        options.output,
    )


if __name__ == "__main__":
    main()
