"""Small reports of every command, as they stand in JSON, with a checkpoint's name that tries to be HTML."""

from __future__ import annotations

import copy
from typing import Any

NASTY = "<script>alert('x')</script>&\"q"


def sizes(elements: int, width: int = 2) -> dict[str, int]:
    return {"elements": elements, "bytes": width * elements, "multiply_adds": elements}


def site(layer: int, kind: str, rank: int, **more: Any) -> dict[str, Any]:
    dense = rank == 16
    return {
        "site": f"model.layers.{layer}.{kind}",
        "kind": f"model.layers.*.{kind}",
        "shape": [16, 16],
        "form": "dense" if dense else "lowrank",
        "rank": rank,
        "full_rank": 16,
        "before": sizes(256),
        "after": sizes(256 if dense else 32 * rank),
        "effective_rank": 5.5,
        "predicted_loss": 0.01 * (layer + 1),
        **more,
    }


def latency(before: float = 0.02, after: float = 0.016) -> dict[str, Any]:
    times = {
        name: {"median": value, "lower": 0.9 * value, "upper": 1.2 * value, "turns": 5}
        for name, value in (("original", before), ("eckart", after))
    }
    return {"batch": 8, "length": 128, "device": "cpu", "dtype": "float32", "threads": 1, "seconds": times,
            "speedup": {"original": 1.0, "eckart": before / after}}  # fmt: skip


def compression(**more: Any) -> dict[str, Any]:
    sites = [site(layer, kind, rank) for layer in (0, 1) for kind, rank in (("q_proj", 4), ("up_proj", 6))]
    sites.append(site(1, "down_proj", 16, left_dense=f"no tokens {NASTY}"))
    return {
        "format_version": 1,
        "model": "LlamaForCausalLM",
        "recipe": {"model": f"/home/someone/{NASTY}", "method": "eckart", "keep": 0.6, "keep_of": "sites"},
        "method": "eckart",
        "paper": "Eckart & Young 1936",
        "exact_for": "the error of the weights",
        "form": "lowrank",
        "allocation": "loss",
        "curvature": "sampled",
        "data": {"source": "/home/someone/text.txt", "calibration_tokens": 1024, "warnings": ["one window is short"]},
        "kept": {"of_sites": 0.6, "of_model": 0.8},
        "ranks": {"target": "cpu", "multiple": 2},
        "sizes": {
            "sites": {"before": sizes(1280), "after": sizes(896)},
            "model": {"before": sizes(2_000_000), "after": sizes(1_400_000)},
        },
        "sites": sites,
        "skipped": {"lm_head": "output head, left alone"},
        "quality": {"agreement": {"kl": 0.0234, "top1": 0.89, "tokens": 64, "finite": True}, "examples": 4,
                    "tokens": 64},
        "notes": [f"a note on {NASTY}"],
        "seconds": {"calibration": 2.0, "factorization": 0.5},
        "latency": latency(),
        "curves": [
            {"sites": ["model.layers.0.q_proj", "model.layers.0.up_proj"], "predicted": 0.03, "measured": 0.001},
            {"sites": ["model.layers.1.q_proj"], "predicted": 0.01, "measured": 0.003},
        ],
        "baselines": [
            {"name": f"original int{bits}", **sizes(2_000_000), "bytes": 250_000 * bits,
             "quality": {"KL to the original": 0.1 / bits**2, "same most likely": 0.9}}
            for bits in (8, 4)
        ],
        "stages": [
            {"stage": "factors", "distance": 0.05, "kept": True},
            {"stage": "refit", "distance": 0.0234, "kept": True},
            {"stage": "refinement", "distance": 0.0345, "kept": False},
        ],
        **copy.deepcopy(more),
    }  # fmt: skip


def comparison() -> dict[str, Any]:
    rows = [
        {
            "method": method, "keep": keep, "of_sites": keep, "of_model": keep, **sizes(int(2e6 * keep)),
            "quality": {"KL to the original": kl, "same most likely": 0.8},
            "latency": latency(after=0.02 * keep), "seconds": 1.0,
        }
        for method, keep, kl in (("svd", 0.8, 0.2), ("svd", 0.4, 1.5), ("drone", 0.8, 0.05), ("drone", 0.4, 0.6))
    ]  # fmt: skip
    return {
        "rows": rows,
        "original": sizes(2_000_000),
        "original_rounded": {"kind": "int8", **sizes(2_000_000, 1), "quality": {"KL to the original": 0.001},
                             "latency": latency(after=0.03)},
        "notes": [f"shared seconds {NASTY}"],
    }  # fmt: skip


def tuning() -> dict[str, Any]:
    return {
        "kind": "tune",
        "model": "LlamaForCausalLM",
        "recipe": {"model": NASTY, "recovery": "lora", "epochs": 3.0},
        "recovery": "lora",
        "recovery_settings": {"rank": 4},
        "paper": "Hu et al. 2021",
        "task": "causal",
        "device": "cpu",
        "data": {"source": "texts.txt"},
        "new_head": [],
        "recovered_by": {"trained": 1000, "of": 20_000},
        "protocol": "windows of 64 tokens",
        "criterion": "perplexity",
        "scores": {"before": {"perplexity": 40.5}, "after": {"perplexity": 31.25}, "teacher": {"perplexity": 30.0}},
        "training": {"steps": 3, "first_loss": 3.6, "last_loss": 3.1, "resumed_from": 0},
        "kept": "after",
        "notes": [],
        "seconds": {"training": 12.5},
    }


def bench() -> dict[str, Any]:
    row = {"phase": "forward", "batch": 1, "length": 64, "mode": "eager", "tokens_per_second": 1e4, "peak_bytes": 5e6}
    seconds = {"median": 0.02, "lower": 0.019, "upper": 0.022}
    fast = {"median": 0.015, "lower": 0.014, "upper": 0.017}
    models = [
        {
            "name": name,
            "role": role,
            "dtype": "float32",
            "factored": 12,
            "held_bytes": 8e6,
            "file_bytes": None,
            "load_seconds": None,
        }
        for name, role in (("original", "original"), (NASTY, "model"), ("original int8", "baseline"))
    ]
    return {
        "device": "cpu", "device_name": "a processor", "threads": 1, "torch": "2.13", "clock": "wall",
        "models": models,
        "rows": [
            {**row, "model": "original", "seconds": seconds, "speedup": 1.0, "reached": None},
            {**row, "model": NASTY, "seconds": fast, "speedup": 1.33, "allowed": 1.5, "reached": 0.89},
            {**row, "model": "original int8", "seconds": fast, "speedup": 1.33, "reached": None},
        ],
        "shares": [
            {"phase": "forward", "batch": 1, "length": 64, "model": name, "shares": {"feed-forward": 0.7, "norms": 0.3}}
            for name in ("original", NASTY)
        ],
        "verdict": ["forward: it is 1.33 times as fast as the original."],
        "notes": ["int8 is simulated"],
    }  # fmt: skip


def scores() -> dict[str, Any]:
    return {
        "model": NASTY,
        "against": "original",
        "task": "perplexity",
        "protocol": "windows of 256 tokens",
        "data": {"source": "/home/someone/held.txt"},
        "device": "cpu",
        "scores": {"perplexity": {"original": 58.9, "eckart": 61.2, "int8": 58.95, "int4": 63.0}},
        "sizes": {key: {"original": 2000, "eckart": 1400, "int8": 2000, "int4": 2000} for key in sizes(1)},
        "latency": latency(),
        "notes": [],
    }


ALL = {"compression": compression, "comparison": comparison, "tuning": tuning, "bench": bench, "scores": scores}
