"""What statistics and the solver take, in bytes, before any of it is made."""

from __future__ import annotations

from collections.abc import Sequence

from eckart.linalg import WIDE

FLOAT32, FLOAT64 = 4, 8

# Bytes for each number of the smaller side squared, and of the weight: measured to lie above what every method took for
# weights of 512 to 3072 on a side, singular metrics included, and mostly 1.2 to 2 times above it.
SQUARE, RECTANGLE = 60, 32


def statistics_bytes(sites: Sequence[tuple[int, int]], groups: Sequence[Sequence[int]], needs: frozenset[str]) -> int:
    """What the sums over the calibration text take; see :class:`eckart.moments.Moments`.

    Args:
        sites: (out, in) of each weight.
        groups: places in `sites` of those that share an input, and with it one Gram; each site in one group.
        needs: any of "gram", "gradients", "fisher", "absolute".

    Returns:
        Bytes: vectors in float64, Grams too as long as they are not wide.
    """
    total = 0
    for group in groups:
        n = sites[group[0]][1]
        total += FLOAT64 * n  # the sum of x, that any of them needs
        total += _gram(n) if "gram" in needs else 0
        total += FLOAT64 * n if "absolute" in needs else 0
        for m, _ in (sites[place] for place in group):
            total += _gram(m) + FLOAT64 * m if "gradients" in needs else 0
            total += FLOAT64 * (m + n) if "fisher" in needs else 0
    return total


def solving_bytes(out_features: int, in_features: int, needs: frozenset[str]) -> int:
    """What the solver takes for one weight beside the weight and its statistics: an upper estimate.

    Two peaks, of which the larger counts. Making the metrics holds up to three copies of each Gram: its mean, centered,
    shrunk. Solving holds one, the roots and decompositions of the smaller side k in float64, and copies of the shape
    of the weight: its image, the factors, and, where the metric does not see all directions, a plain SVD.

    Args:
        out_features: m.
        in_features: n.
        needs: as for :func:`statistics_bytes`.

    Returns:
        Bytes, the full factors included that the solver hands back.
    """
    m, n = out_features, in_features
    grams = (_gram(n) if "gram" in needs else 0) + (_gram(m) if "gradients" in needs else 0)
    return max(3 * grams, grams + SQUARE * min(m, n) ** 2 + RECTANGLE * m * n)


def _gram(width: int) -> int:
    """Bytes of a Gram, see :func:`eckart.moments.accumulate.empty_gram`."""
    return width * width * (FLOAT32 if width > WIDE else FLOAT64)
