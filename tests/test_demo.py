"""`eckart demo` at a reduced size: offline, from comparison to a fresh process."""

import math

import pytest

from eckart.cli.app import app
from eckart.demo.show import DEFAULT, Demo, check_same
from eckart.errors import EckartError


def test_demo_compares_publishes_and_reloads(capsys, tmp_path):
    words = ["--windows", "4", "--held-tokens", "1024", "--methods", f"svd,{DEFAULT}", "--output-dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as left:
        app(["demo", *map(str, words)])
    found = capsys.readouterr()
    assert not left.value.code, found.err
    for part in ("original", "svd", f"{DEFAULT} (default)", "in a fresh process", "class Reader", "What to try next"):
        assert part in found.out
    assert (tmp_path / "out" / "config.json").is_file()


def test_reload_that_differs_is_an_error(tmp_path):
    check_same(20.0, 20.0001, tmp_path)
    for there in (20.1, math.nan):
        with pytest.raises(EckartError, match="fresh process"):
            check_same(20.0, there, tmp_path)


def test_folder_that_cannot_be_loaded_is_an_error(tmp_path):
    with pytest.raises(EckartError, match="fresh process"):
        Demo().reload(tmp_path)
