"""`eckart demo`: everything once, offline, on the bundled model."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.compare import split_words
from eckart.cli.console import check_json, guarded, say, show, write_json
from eckart.cli.options import JsonOption
from eckart.cli.terminal import Verbatim
from eckart.registry import METHODS

DURATION = "The demo takes about three minutes on one core of a CPU, and less on several."

NEXT = (
    "What to try next:",
    "  eckart compress MODEL --keep 0.7 --data your.txt --output-dir DIR   your own model, your own text",
    "  eckart eval DIR --against MODEL --data held.txt                     what it cost, beside int8 and int4",
    "  eckart inspect MODEL                                                which weights can be factored",
    "  eckart compare MODEL --methods svd,drone,eckart --keep 0.9,0.7,0.5  which method suits it",
)


@guarded
def demo(
    output_dir: Annotated[
        Path | None, typer.Option(help="Keep the compressed model in this folder. Default: a temporary one.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that eckart published.")] = False,
    keep: Annotated[
        float, typer.Option(help="Fraction of the numbers that the published model stores.", min=0.05, max=1)
    ] = 0.7,
    json: JsonOption = None,
    windows: Annotated[int, typer.Option(hidden=True, min=2)] = 24,
    held_tokens: Annotated[int, typer.Option(hidden=True, min=512)] = 8_192,
    methods: Annotated[str, typer.Option(hidden=True)] = ",".join(METHODS),
) -> None:
    """Compare all methods on a small bundled model, publish one, and load it in a fresh process. No network.

    The model is a small Llama trained on the source of Python's standard library. It is measured on modules of the
    library that neither training nor calibration read.

    Example: eckart demo --output-dir demo-70
    """
    start = time.perf_counter()
    check_json(json, [output_dir])
    names = [METHODS.check(name) for name in split_words(methods, "--methods")]

    from eckart.compression.result import load_lines
    from eckart.demo.reload import check_same, reload_in_fresh_process
    from eckart.demo.steps import DEFAULT, MODEL, Demo
    from eckart.demo.tables import ranking_table, reload_lines
    from eckart.report.compression import render_compression
    from eckart.storage.publish import check_output

    shown = Demo(windows, held_tokens, methods=names)
    if output_dir is not None:
        check_output(output_dir, overwrite=overwrite, inputs=[MODEL])
    source = shown.source
    say(f"The bundled model: {source.elements:,} parameters, {source.bytes / 1e6:.1f} MB. {DURATION}")
    say(f"Comparing {len(names)} methods at {len(shown.keeps)} sizes ...")
    dense = shown.measure(source.model)
    rows = []
    for row in shown.rows():
        rows.append(row)
        if not sys.stderr.isatty():  # where no bar is shown
            say(f"  {row.method} at --keep {row.keep:g}: perplexity {row.perplexity:.2f}", "dim")
    show(ranking_table(dense, rows, shown), "")

    say(f"Compressing it by the default, {DEFAULT}, at --keep {keep:g} ...")
    with tempfile.TemporaryDirectory(prefix="eckart-demo-") as temporary:
        result, folder = shown.publish(output_dir or Path(temporary) / "demo", keep, overwrite)
        here = shown.measure(result.model)
        show(render_compression(result.report), "")
        say("Loading it in a fresh process ...")
        found = reload_in_fresh_process(folder, shown.held_out)
        check_same(here, found.perplexity, folder)
        listed = next((row.perplexity for row in rows if (row.method, row.keep) == (DEFAULT, keep)), None)
        show(reload_lines(source.bytes, found.bytes, dense, here, found.perplexity, found.text, listed))
        if output_dir is not None:
            show(Verbatim(f"published in {folder}; to load it:\n\n{load_lines(result, folder)}\n"))
    show(*NEXT, f"\n{time.perf_counter() - start:.0f} s in all")
    write_json(
        json,
        {
            "perplexity": {"original": dense, "compressed": here, "loaded": found.perplexity},
            "bytes": {"original": source.bytes, "compressed": found.bytes},
            "rows": [asdict(row) for row in rows],
            "seconds": round(time.perf_counter() - start, 1),
        },
        [output_dir],
    )
