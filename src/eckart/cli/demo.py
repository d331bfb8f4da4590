"""`eckart demo`: all of it, offline, on the bundled model."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from eckart.cli.console import guarded, say, show
from eckart.compression.result import load_lines
from eckart.demo.show import DEFAULT, MODEL, Demo, DemoRow, check_same
from eckart.methods import METHODS, method_named
from eckart.report.compression import render_compression
from eckart.report.words import add_columns, format_number, make_table
from eckart.storage.publish import check_output


@guarded
def demo(
    output_dir: Annotated[
        Path | None, typer.Option(help="Keep the compressed model in this folder. Default: a temporary one.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that is there.")] = False,
    keep: Annotated[float, typer.Option(help="Size of the model that is published.", min=0.05, max=1)] = 0.7,
    windows: Annotated[int, typer.Option(hidden=True, min=2)] = 24,
    held_tokens: Annotated[int, typer.Option(hidden=True, min=512)] = 8_192,
    methods: Annotated[str, typer.Option(hidden=True)] = ",".join(METHODS),
) -> None:
    """Compare all methods on a small bundled model, publish one, and load it in a fresh process. No network.

    The model is a small Llama trained on the Python standard library's source; it is measured on modules of the
    library that neither training nor calibration saw.

    Example: eckart demo --output-dir demo-70
    """
    start = time.perf_counter()
    names = [method_named(name.strip()).name for name in methods.split(",")]
    shown = Demo(windows, held_tokens, methods=names)
    if output_dir is not None:
        check_output(output_dir, overwrite=overwrite, source=MODEL)
    source = shown.source
    say(f"The bundled model: {source.elements:,} parameters, {source.bytes / 1e6:.1f} MB. Comparing methods ...")
    dense = shown.measure(source.model)
    rows = []
    for row in shown.rows():
        rows.append(row)
        if not sys.stderr.isatty():  # where no bar is shown
            say(f"  {row.method} at --keep {row.keep:g}: perplexity {row.perplexity:.2f}", "dim")
    show(_ranking(dense, rows, shown), "")

    say(f"Compressing it by the default, {DEFAULT}, at --keep {keep:g} ...")
    with tempfile.TemporaryDirectory(prefix="eckart-demo-") as temporary:
        result, folder = shown.publish(output_dir or Path(temporary) / "demo", keep, overwrite)
        here = shown.measure(result.model)
        show(render_compression(result.report), "")
        say("Loading it in a fresh process ...")
        found = shown.reload(folder)
        check_same(here, found.perplexity, folder)
        _last(source.bytes, found.bytes, dense, here, found.perplexity, found.text)
        if output_dir is not None:
            show(f"published in {folder}; to load it:", "", load_lines(result, folder), "")
    show(*NEXT, f"\n{time.perf_counter() - start:.0f} s in all")


NEXT = (
    "What to try next:",
    "  eckart compress MODEL --keep 0.7 --data your.txt --output-dir DIR   your own model, your own text",
    "  eckart eval DIR --against MODEL --data held.txt                     what it cost, beside int8 and int4",
    "  eckart inspect MODEL                                                what there is to factor",
    "  eckart compare MODEL --methods svd,drone,eckart --keep 0.9,0.7,0.5  which method suits it",
)


def _ranking(dense: float, rows: Sequence[DemoRow], shown: Demo) -> Group:
    """Methods by what they cost: best first at the first size."""
    found = {(row.method, row.keep): row for row in rows}
    keeps = list(shown.keeps)
    heads = [head for keep in keeps for head in (f"keep {keep:g}", "change")]
    table = add_columns(make_table("perplexity on held-out modules"), "method", [*heads, "seconds"])
    table.add_row("original", *(cell for _ in keeps for cell in (format_number(dense), "")), "", style="dim")
    for name in sorted(shown.methods, key=lambda name: found[name, keeps[0]].perplexity):
        cells = []
        for keep in keeps:
            score = found[name, keep].perplexity
            cells += [format_number(score), f"{score / dense - 1:+.1%}"]
        seconds = sum(found[name, keep].seconds for keep in keeps)
        label = f"{name} (default)" if name == DEFAULT else name
        table.add_row(label, *cells, f"{seconds:.1f}", style="bold green" if name == DEFAULT else "")
    caption = (
        f"{shown.windows} windows of {shown.window} tokens to calibrate on, {shown.held_tokens:,} others to measure "
        "on; keep: the share of the sites' numbers that is stored"
    )
    return Group(table, Text(caption, style="dim"))


def _last(before: int, after: int, dense: float, here: float, there: float, text: str) -> None:
    show(
        f"on disk: {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({after / before:.1%}); perplexity {dense:.2f} -> "
        f"{here:.2f}, and {there:.2f} in a fresh process that loaded it with from_pretrained. It writes:",
        "",
        "\n".join(f"    {line}" for line in text.rstrip().splitlines()),
        "",
    )
