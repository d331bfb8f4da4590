"""The page for newcomers: its code runs. (`make lint` checks its picture.)"""

import re
from pathlib import Path

import pytest

from eckart.registry import FORMS, METHODS, RECOVERIES, STATISTICS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clean_registries():
    """What the page registers is taken out again."""
    yield
    for registry in (METHODS, FORMS, STATISTICS, RECOVERIES):
        registry._added.clear()


def test_code_of_the_page_runs_and_does_what_it_says(clean_registries):
    page = (ROOT / "docs" / "architecture.md").read_text()
    names: dict = {"__name__": "page"}
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page, re.DOTALL)):
        exec(compile(code, f"docs/architecture.md, block {number}", "exec"), names)
    assert names["result"].report["form"] == "scaled"
    assert FORMS["scaled"] is names["Scaled"]
    assert {"input-scale", "peaks"} <= set(METHODS)
    assert 0 < names["tuned"].report["recovered_by"]["trained_fraction"] < 0.01
