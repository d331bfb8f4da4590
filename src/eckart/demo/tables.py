"""What the demo prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from eckart.demo.steps import DEFAULT, Demo, DemoRow
from eckart.report.words import add_columns, format_number, make_table


def ranking_table(dense: float, rows: Sequence[DemoRow], shown: Demo) -> Group:
    """Methods by the perplexity they leave, the best at the first size on top."""
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
        "on; keep: the part of the numbers in the linear layers that is stored; seconds: of what each method does by "
        "itself at all sizes, without the statistics that they share and without measuring"
    )
    return Group(table, Text(caption, style="dim"))


def reload_lines(
    before: int, after: int, dense: float, here: float, there: float, text: str, listed: float | None = None
) -> str:
    """Sizes in bytes and perplexities before and after, and what the reloaded model writes.

    Args:
        before: bytes of the original.
        after: bytes of the published model.
        dense: perplexity of the original.
        here: of the compressed model in this process.
        there: of the published model in a fresh process.
        text: what that writes.
        listed: what the table of methods has for the same method and size; None where it has none.
    """
    written = "\n".join(f"    {line}" for line in text.rstrip().splitlines())
    other = (
        f" The table has {listed:.2f} for it: a comparison reads one text for all methods, more of it where one of "
        "them trains, so it was calibrated on other windows."
        if listed is not None and f"{listed:.2f}" != f"{here:.2f}"
        else ""
    )
    return (
        f"on disk: {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({after / before:.1%}); perplexity {dense:.2f} -> "
        f"{here:.2f}, and {there:.2f} in a fresh process that loaded it with from_pretrained.{other} It writes:\n\n"
        f"{written}\n"
    )
