"""What the measured times say: where factoring is faster, and when it is not the thing to do."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from eckart.speed.subjects import BASELINE, MODEL, ORIGINAL

FASTER = 1.02
"""Speed-ups below this are none."""


def judge(rows: Sequence[Mapping[str, Any]], subjects: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each phase and each model beside its original, from geometric means over the sizes.

    Args:
        rows: `phase`, `mode`, `model`, `speedup` over the original.
        subjects: `name`, `role`, `of`, `dtype`.
    """
    sentences = []
    eager = [row for row in rows if row["mode"] == "eager" and row["speedup"] is not None]
    for phase in dict.fromkeys(row["phase"] for row in eager):
        speedups: dict[str, list[float]] = {}
        for row in eager:
            if row["phase"] == phase:
                speedups.setdefault(row["model"], []).append(row["speedup"])
        means = {name: statistics.geometric_mean(values) for name, values in speedups.items()}
        for subject in subjects:
            if subject["role"] == MODEL and subject["name"] in means:
                sentences.append(f"{phase}: {_sentence(subject['name'], means, subjects)}")
    return sentences


def _sentence(name: str, means: Mapping[str, float], subjects: Sequence[Mapping[str, Any]]) -> str:
    own = means[name]
    rounded = {
        other["name"]: means[other["name"]]
        for other in subjects
        if other["role"] == BASELINE and other["of"] == ORIGINAL and other["name"] in means
    }
    both = {
        other["name"]: means[other["name"]]
        for other in subjects
        if other["role"] == BASELINE and other["of"] == name and other["name"] in means
    }
    best = max(rounded, key=lambda each: rounded[each], default=None)
    words = f"{name} is {own:.2f} times as fast as the original"
    if best is not None and rounded[best] > max(own, FASTER):
        words += f", and {best} without any factoring {rounded[best]:.2f} times: factoring alone is not the thing to do"
        together = max(both, key=lambda each: both[each], default=None)
        if together is None:
            return f"{words} here."
        if both[together] > rounded[best] * FASTER:
            return f"{words} here; {together}, which is both, is {both[together]:.2f} times as fast."
        return f"{words} here, and {together} ({both[together]:.2f} times) gains nothing over it."
    if own < FASTER:
        return (
            f"{words}: factoring is not the thing to do for speed here; plan with --objective latency, or stay dense."
        )
    if best is None:
        return f"{words}."
    return f"{words}, more than {best} ({rounded[best]:.2f} times)."
