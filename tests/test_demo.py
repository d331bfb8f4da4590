"""`eckart demo` on a smaller model: offline, from comparison to a fresh process."""

import math
from itertools import islice

import pytest
from tiny import llama, place

from eckart.cli.app import app
from eckart.data import stdlib
from eckart.demo import reload, steps
from eckart.demo.reload import check_same, reload_in_fresh_process
from eckart.demo.steps import DEFAULT, Demo, DemoRow
from eckart.demo.tables import ranking_table, reload_lines
from eckart.errors import EckartError
from eckart.report.words import to_plain_text


def test_demo_compares_publishes_and_reloads(capsys, monkeypatch, tmp_path):
    model = llama(num_hidden_layers=2, max_position_embeddings=256)
    monkeypatch.setattr(steps, "MODEL", place(model, tmp_path / "model"))
    monkeypatch.setattr(reload, "NEW_TOKENS", 2)
    every = stdlib.documents
    monkeypatch.setattr(stdlib, "documents", lambda part: islice(every(part), 8))
    words = ["--windows", "2", "--held-tokens", "512", "--methods", "svd", "--output-dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as left:
        app(["demo", *map(str, words)])
    found = capsys.readouterr()
    assert not left.value.code, found.err
    for part in (
        "original",
        "svd",
        f"by the default, {DEFAULT}",
        "in a fresh process",
        "class Reader",
        "to try next",
        "minutes on one",
    ):
        assert part in found.out + found.err
    assert (tmp_path / "out" / "config.json").is_file()


def test_ranking_puts_the_best_method_on_top():
    rows = [DemoRow(name, keep, 20.0 + place, keep, 1.5) for keep in (0.7, 0.4) for place, name in enumerate("ba")]
    text = to_plain_text(ranking_table(20.0, rows, Demo(methods=("a", "b")))).splitlines()
    assert [line.split()[0] for line in text[2:5]] == ["original", "b", "a"]
    assert text[4].split() == ["a", "21.00", "+5.0%", "21.00", "+5.0%", "3.0"]


def test_other_number_in_the_table_is_explained():
    told = reload_lines(100, 80, 20.0, 22.41, 22.41, "x", 22.49)
    assert "The table has 22.49 for it: a comparison reads one text" in told
    for same in (None, 22.411):
        assert "The table" not in reload_lines(100, 80, 20.0, 22.41, 22.41, "x", same)


def test_reload_that_differs_is_an_error(tmp_path):
    check_same(20.0, 20.0001, tmp_path)
    for there in (20.1, math.nan):
        with pytest.raises(EckartError, match="fresh process"):
            check_same(20.0, there, tmp_path)


def test_folder_that_cannot_be_loaded_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(reload, "PROGRAM", "raise OSError('no weights')")
    with pytest.raises(EckartError, match=r"fresh process(.|\n)*no weights"):
        reload_in_fresh_process(tmp_path, Demo().held_out)
