"""Bytes that statistics and the solver take, estimated before any of it is made."""

from __future__ import annotations

from collections.abc import Sequence

from eckart.linalg import WIDE
from eckart.linalg.blocks import BLOCK
from eckart.moments.statistic import MEAN, InputStatistic, statistics_named

# Bytes for each number of the smaller side squared, and of the weight: measured to lie above what every method took for
# weights of 512 to 3072 on a side, singular metrics included, and mostly 1.2 to 2 times above it.
SQUARE, RECTANGLE = 60, 32


# Copies of a square of all neurons that are held at once while they are put in order.
NEURON_SQUARES = 7


def statistics_bytes(sites: Sequence[tuple[int, int]], groups: Sequence[Sequence[int]], needs: frozenset[str]) -> int:
    """Bytes of the sums over the calibration text.

    Args:
        sites: (out, in) of each weight.
        groups: places in `sites` of those that share an input, and with it one Gram; each site in one group.
        needs: names of statistics.
    """
    kinds = statistics_named({MEAN, *needs}).values()
    total = 0
    for group in groups:
        for kind in kinds:
            counted = group[:1] if issubclass(kind, InputStatistic) else group
            total += sum(kind.nbytes(*sites[place]) for place in counted)
    return total


def solving_bytes(out_features: int, in_features: int, needs: frozenset[str]) -> int:
    """Bytes that the solver takes for one weight beside the weight and its statistics: an upper estimate.

    Two peaks, of which the larger counts. Making the metrics holds up to three copies of each statistic: its mean,
    centered, shrunk. Solving holds one, the roots and decompositions of the smaller side k in float64, and copies of
    the shape of the weight: its image, the factors, and, where the metric does not see all directions, a plain SVD.

    Args:
        out_features: m.
        in_features: n.
        needs: names of statistics.

    Returns:
        Bytes, the full factors included that the solver returns.
    """
    m, n = out_features, in_features
    metrics = sum(kind.nbytes(m, n) for kind in statistics_named(needs).values())
    return max(3 * metrics, metrics + SQUARE * min(m, n) ** 2 + RECTANGLE * m * n)


def slicing_bytes(out_features: int, neurons: int) -> tuple[int, int]:
    """Bytes that it takes to put neurons in order, and of those the bytes that are kept.

    Args:
        out_features: m, of the weight that reads them.
        neurons: w.

    Returns:
        Both, upper estimates: the second is `W L` (m, w) and half of the triangle L (w, w), stored by blocks.
    """
    number = 4 if neurons > WIDE else 8
    kept = number * (out_features * neurons + neurons * (neurons + BLOCK) // 2)
    return NEURON_SQUARES * number * neurons**2 + RECTANGLE * out_features * neurons + kept, kept
