"""Tables are read on a terminal of 80 columns: no word is broken there, and no number is cut."""

from __future__ import annotations

import pytest
from architectures import BY_NAME

import eckart
from eckart.report.compression import render_compression
from eckart.report.inspection import render_inspection
from eckart.report.words import shorten, split_kind, to_plain_text


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
