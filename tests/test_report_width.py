"""Tables are read on a terminal of 80 columns: no word is broken there, and no number is cut."""

from __future__ import annotations

import re

import pytest
import reports
from architectures import BY_NAME

import eckart
from eckart.demo.steps import Demo, DemoRow
from eckart.demo.tables import ranking_table
from eckart.registry import METHODS
from eckart.report.catalog import list_catalog
from eckart.report.compression import render_compression
from eckart.report.inspection import render_inspection
from eckart.report.scores import render_comparison, render_scores
from eckart.report.speed import render_bench
from eckart.report.training import render_tuning
from eckart.report.wide_table import WideTable, wrap_words
from eckart.report.words import format_bytes, shorten, split_kind, to_plain_text


def lines_of_tables(renderable):
    """Lines at 80 columns as they are at 200: what is a sentence may be wrapped, a table's line may not."""
    narrow, wide = (to_plain_text(renderable, width=width).splitlines() for width in (80, 200))
    assert max(map(len, narrow)) <= 80
    return narrow, wide


@pytest.mark.parametrize("name", ["llama", "t5", "bert-mlm"])
def test_no_table_is_wider_than_a_terminal(name):
    model = BY_NAME[name].model()
    result = eckart.compress(model, method="svd", keep=0.5)
    narrow, wide = lines_of_tables(render_compression(result.report))
    start = narrow.index("kept of the sites")
    end = next(i for i, line in enumerate(narrow) if line.startswith("whole model, after"))
    assert narrow[start : end + 1] == wide[wide.index("kept of the sites") :][: end + 1 - start]
    assert f"{result.report['sizes']['model']['after']['elements'] / 1e3:.2f} k" in narrow[end]
    narrow, wide = lines_of_tables(render_inspection(eckart.inspect(model)))
    end = next(i for i, line in enumerate(narrow) if line.startswith("site: "))
    assert narrow[:end] == wide[:end]


def test_neurons_are_not_called_ranks():
    heads = {}
    for forms in (["lowrank"], ["sliced"], ["lowrank", "sliced"]):
        sites = [reports.site(0, f"up_proj{i}", 20, form=form, full_rank=64) for i, form in enumerate(forms)]
        narrow, wide = lines_of_tables(render_compression({**reports.compression(), "ranks": {}, "sites": sites}))
        head = next(line for line in wide if line.startswith("kind of site"))
        assert head in narrow
        heads[tuple(forms)] = re.split(r"  +", head)[2]
    assert list(heads.values()) == ["rank", "neurons", "rank or neurons"]


def test_rounding_of_the_original_stands_beside_the_model():
    report = {**reports.compression(), "ranks": {}}
    narrow, wide = lines_of_tables(render_compression(report))
    start = narrow.index("beside plain rounding of the original")
    assert narrow[start : start + 5] == wide[wide.index(narrow[start]) :][:5]
    rows = [re.split(r"  +", line.strip()) for line in narrow[start + 1 : start + 5]]
    assert rows == [
        ["model", "bytes", "KL to the original", "same most likely"],
        ["this model", "2.80 MB", "0.0234", "0.8900"],
        ["original int8", "2.00 MB", "0.0016", "0.9000"],
        ["original int4", "1.00 MB", "0.0063", "0.9000"],
    ]
    for without in ({"baselines": []}, {"quality": None}):
        assert "plain rounding" not in to_plain_text(render_compression({**report, **without}))


def test_what_the_seconds_of_the_steps_leave_out_is_said():
    said = to_plain_text(render_compression({**reports.compression(), "ranks": {}}), 200)
    assert "time of the steps: 2.5 s (calibration 2.0, factorization 0.5); starting, opening the model and pub" in said


def test_kinds_stand_under_the_part_that_is_repeated():
    result = eckart.compress(BY_NAME["t5"].model(), method="svd", keep=0.5)
    lines = to_plain_text(render_compression(result.report)).splitlines()
    first, second = (lines.index(f"{side}.block.*.layer.*") for side in ("encoder", "decoder"))
    assert lines[first + 1].split()[:4] == ["SelfAttention.q", "2", "of", "2"]
    assert lines[second + 1].startswith("  SelfAttention.q")


def test_names_are_shortened_in_the_middle():
    assert split_kind("model.layers.*.mlp.up_proj") == ("model.layers.*", "mlp.up_proj")
    assert split_kind("lm_head") == ("", "lm_head")
    assert shorten("mlp.up_proj", 24) == "mlp.up_proj"
    found = shorten("attention.output.some.very.long.name.dense", 24)
    assert len(found) == 24
    assert found.startswith("attentio")
    assert found.endswith("name.dense")


LONG = "a-model-of-some-length-int8-dynamic"


def wide_comparison():
    found = reports.comparison()
    found["rows"][0]["method"] = "basis-sharing"
    for row in found["rows"]:
        before = {key: row[key] for key in ("elements", "bytes", "multiply_adds", "quality")}
        row |= {"rounded": "int8-dynamic", "before_rounding": before}
    return render_comparison(found)


def wide_scores():
    found = reports.scores()
    columns = ("original", "eckart", "original int4", "eckart int4", "int8", "int4", "eckart int8")
    labels = ("perplexity", "KL to the original per token (nats)", "hendrycksTest-abstract_algebra acc_norm")
    found["scores"] = {label: dict.fromkeys(columns, 12345.678) for label in labels}
    found["sizes"] = {key: dict.fromkeys(columns, 123_456_789) for key in found["sizes"]}
    return render_scores(found)


def wide_bench():
    found = reports.bench()
    kinds = ("feed-forward", "attention projections", "attention scores", "matrices in blocks", "activations and sums",
             "norms", "embeddings", "heads", "other")  # fmt: skip
    shares = dict.fromkeys(kinds, 0.1234)
    for row in (*found["rows"], *found["shares"]):
        row |= {"phase": "prefill", "batch": 256, "length": 131_072}
        row["model"] = LONG if row["model"] == reports.NASTY else row["model"]
    for row in found["rows"]:
        row["mode"] = "compiled"
    for row in found["shares"]:
        row["shares"] = shares
    for row in found["models"]:
        row |= {"file_bytes": 123_456_789, "load_seconds": 123.45}
    return render_bench(found)


def tuning():
    found = reports.tuning()
    for row in found["scores"].values():
        row["KL to the original per token (nats)"] = 1234.5
    return render_tuning(found)


def ranking():
    rows = [DemoRow(name, keep, 2000.0, keep, 123.4) for keep in (0.7, 0.4) for name in METHODS]
    return ranking_table(20.0, rows, Demo(methods=tuple(METHODS)))


TABLES = {
    "compare": wide_comparison,
    "eval": wide_scores,
    "bench": wide_bench,
    "tune": tuning,
    "methods": lambda: list_catalog("eckart"),
    "demo": ranking,
}


@pytest.mark.parametrize("command", TABLES)
def test_whatever_stands_in_a_wide_table_stands_whole_in_a_narrow_one(command):
    wide, narrow = (to_plain_text(TABLES[command](), width=width) for width in (300, 80))
    assert max(map(len, narrow.splitlines())) <= 80
    assert max(map(len, wide.splitlines())) > 80 or command in ("tune", "demo")
    assert set(wide.split()) <= set(narrow.split())


def test_what_does_not_fit_stands_in_a_further_table_with_the_words_again():
    table = WideTable(["name"], ["first", "second", "third"], title="numbers")
    table.add_row("one", "1.25", "2.25", "3.25")
    whole = to_plain_text(table, width=80).splitlines()
    assert [line.split() for line in whole] == [
        ["numbers"], ["name", "first", "second", "third"], ["one", "1.25", "2.25", "3.25"],
    ]  # fmt: skip
    exact = to_plain_text(table, width=len(whole[1])).splitlines()
    assert exact == whole
    parts = [line.split() for line in to_plain_text(table, width=len(whole[1]) - 1).splitlines()]
    assert parts == [
        ["numbers"], ["name", "first", "second"], ["one", "1.25", "2.25"], [], ["name", "third"], ["one", "3.25"],
    ]  # fmt: skip


def test_long_labels_are_broken_between_words():
    assert wrap_words("KL to the original", 12) == "KL to the\noriginal"
    assert wrap_words("speed-up", 5) == "s…-up"
    assert wrap_words("", 5) == ""


def test_sizes_have_their_unit():
    assert [format_bytes(value) for value in (12, 1_500, 2_000_000)] == ["12 B", "1.50 kB", "2.00 MB"]
