"""Spectra of weights: how fast the singular values fall, and where the rank cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eckart.report.page.blocks import Block, Key, Picture, Table
from eckart.report.page.lines import Curve, draw_spectrum
from eckart.report.page.svg import sample

ROUNDING = 1e-6
"""Singular values below this part of the largest are rounding errors after the stored rank: they are not drawn."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a weight.

    Attributes:
        site: its name.
        form: that it is stored in.
        rank: that is stored; None for a dense weight.
        values: of the weight as it is stored, falling.
        original: of the weight that it was made from, falling; () where that was not read.
    """

    site: str
    form: str
    rank: int | None
    values: Sequence[float]
    original: Sequence[float] = ()


def show_spectra(spectra: Sequence[Spectrum]) -> list[Block]:
    """One picture for each weight, in parts of the largest singular value of the original."""
    return [_show(spectrum) for spectrum in spectra if any(spectrum.values)]


def _show(spectrum: Spectrum) -> Picture:
    largest = max([*spectrum.original[:1], *spectrum.values[:1]]) or 1.0
    own = [value / largest for value in spectrum.values if value > ROUNDING * largest]
    before = [value / largest for value in spectrum.original]
    curves = [*([Curve(before, 3)] if before else []), Curve(own, 0)]
    legend = [*([Key(sample(3), "original")] if before else []), Key(sample(0), f"as stored: {spectrum.form}")]
    squares = [value * value for value in before or own]
    rank = spectrum.rank
    about = f"{len(squares)} singular values"
    if rank is not None and rank < len(squares) and sum(squares) > 0:
        about += f"; the first {rank} hold {sum(squares[:rank]) / sum(squares):.1%} of the sum of squares"
    places = sorted({1, *(len(squares) * part // 8 for part in range(1, 9))} - {0})
    rows = [[str(n), f"{before[n - 1]:.4g}" if n <= len(before) else "", f"{own[n - 1]:.4g}" if n <= len(own) else ""]
            for n in places]  # fmt: skip
    numbers = Table("In parts of the largest", ["number", "original", "as stored"], rows)
    drawn = draw_spectrum(f"Spectrum of {spectrum.site}", about, curves, rank)
    return Picture(f"{spectrum.site}: {about}", drawn, legend, numbers)
