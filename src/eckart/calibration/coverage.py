"""Statistics that say nothing, and those that say little."""

from __future__ import annotations

from collections.abc import Mapping

from eckart.moments import Moments

UNREACHED = "no token of the calibration data reached it"
NO_GRADIENT = "the loss has no gradient there: the output does not depend on it, or every prediction is certain"


def why_useless(entry: Moments) -> str | None:
    """Why a site's statistics say nothing, in words, or None."""
    if entry.tokens == 0:
        return UNREACHED
    gradients = [found for found in entry.own.values() if found.needs_backward]
    if gradients and all(found.is_zero for found in gradients):
        return NO_GRADIENT
    return None


def note_few_tokens(seen: Mapping[str, tuple[int, int]]) -> list[str]:
    """Note sites that saw fewer tokens than they have features: their Grams are singular.

    Args:
        seen: for each site, tokens and features.
    """
    few = {name: (count, width) for name, (count, width) in seen.items() if count < width}
    if not few:
        return []
    fewest = sorted(few, key=lambda name: few[name][0] / few[name][1])[:3]
    named = ", ".join(f"{name} {few[name][0]} for {few[name][1]}" for name in fewest)
    return [
        f"sites that saw fewer tokens than they have features: {len(few)} (the fewest: {named}); "
        "what the text does not show is kept by plain SVD; give more text with --num-samples"
    ]
