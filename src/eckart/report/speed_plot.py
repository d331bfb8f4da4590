"""A picture of a benchmark: speed-ups beside what is allowed, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eckart.errors import UsageError
from eckart.report.speed import COLUMNS, format_machine

ENDINGS = (".png", ".svg")


MARK = b"eckart bench"
LOOKED_AT = 1 << 16
"""What a picture of eckart says of itself, in its first bytes; a file that does not is never replaced."""


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be drawn or written, before anything is timed.

    Raises:
        UsageError: matplotlib is not installed, the ending is not one of :data:`ENDINGS`, there is no such folder, or
            something else has the name: only pictures of eckart are replaced.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"--plot {path}: the name must end in {' or '.join(ENDINGS)}.")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}. Make it, or choose another.")
    if path.exists() and not path.is_file():
        raise UsageError(f"--plot {path}: is there already and is no file. Choose another name.")
    if path.exists() and path.stat().st_size and MARK not in path.read_bytes()[:LOOKED_AT]:
        raise UsageError(f"--plot {path}: is there already and was not drawn by eckart. Choose another name.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            f"--plot {path}: needs matplotlib, which is not installed; run pip install 'eckart[report]'."
        ) from None


def plot_bench(found: Mapping[str, Any], path: Path) -> None:
    """Draw what :func:`eckart.bench` returned.

    Bars are speed-ups over the original with the middle half of the calls (tokens a second without an original); a
    line above a bar is what is allowed. Below, the share of each kind of module in the time.

    Args:
        found: the results.
        path: of the picture, .png or .svg.

    Raises:
        UsageError: as :func:`check_plot`; or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    rows = [row for row in found["rows"] if row["mode"] == "eager"]
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    sizes = list(dict.fromkeys((row["batch"], row["length"]) for row in rows))
    models = [row["name"] for row in found["models"]]
    width = max(7.0 / len(phases), 1.5 + 0.4 * len(sizes) * len(models)) * len(phases)
    figure: Any = Figure(figsize=(width, 9), layout="constrained")
    axes = figure.subplots(2, len(phases), squeeze=False)
    for column, phase in enumerate(phases):
        _draw_speedups(axes[0][column], phase, [row for row in rows if row["phase"] == phase], sizes, models)
        _draw_shares(axes[1][column], [row for row in found["shares"] if row["phase"] == phase])
    for row, place, title in ((0, "outside upper center", format_machine(found)), (1, "outside lower center", None)):
        handles, labels = axes[row][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc=place, title=title, ncols=5, fontsize="small", frameon=False)
    try:
        written_by = {"Software" if path.suffix.lower() == ".png" else "Creator": MARK.decode()}
        figure.savefig(path, dpi=120, metadata=written_by)
    except OSError as error:
        raise UsageError(f"--plot {path}: cannot be written ({error.strerror}). Choose another file.") from error


def _draw_speedups(
    axes: Any, phase: str, rows: list[Mapping[str, Any]], sizes: list[tuple[int, int]], models: list[str]
) -> None:
    relative = all(row["speedup"] is not None for row in rows)
    breadth = 0.8 / len(models)
    for number, name in enumerate(models):
        own = {(row["batch"], row["length"]): row for row in rows if row["model"] == name}
        places = [at + (number - (len(models) - 1) / 2) * breadth for at, size in enumerate(sizes) if size in own]
        shown = [own[size] for size in sizes if size in own]
        heights = [row["speedup"] if relative else row["tokens_per_second"] for row in shown]
        spread = [
            [height * _change(row["seconds"], end) for height, row in zip(heights, shown, strict=True)]
            for end in ("upper", "lower")
        ]
        bars = axes.bar(places, heights, breadth, yerr=spread, label=name, error_kw={"lw": 0.8})
        axes.bar_label(bars, fmt="%.2f" if relative else "%.3g", fontsize=7, label_type="center", rotation=90)
        for place, row in zip(places, shown, strict=True):
            if "allowed" in row:
                axes.hlines(row["allowed"], place - breadth / 2, place + breadth / 2, colors="black", lw=2)
    if relative:
        axes.axhline(1, color="gray", lw=0.8, ls="--")
    axes.set_xticks(range(len(sizes)), [f"{batch} x {length}" for batch, length in sizes])
    axes.set_title(phase)
    axes.set_ylabel("speed-up over the original (black: allowed)" if relative else "tokens a second")


def _change(seconds: Mapping[str, float], end: str) -> float:
    """How far a quartile moves the bar, as a fraction of it: a call that takes longer is a lower bar."""
    return abs(seconds["median"] / seconds[end] - 1)


def _draw_shares(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    labels = [f"{row['model']}\n{row['batch']} x {row['length']}" for row in rows]
    left = [0.0] * len(rows)
    for number, (kind, word) in enumerate(COLUMNS.items()):
        if not any(kind in row["shares"] for row in rows):
            continue
        values = [100 * row["shares"].get(kind, 0.0) for row in rows]
        axes.barh(labels, values, left=left, label=word, color=f"C{number}")
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("per cent of the time, by kind of module")
    axes.tick_params(axis="y", labelsize="small")
