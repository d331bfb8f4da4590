"""The catalog of methods, forms and recoveries, read from the sources."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from eckart.registry import EMBEDDINGS, FORMS, METHODS, RECOVERIES
from eckart.report.catalog import describe_catalog, list_catalog, list_methods
from eckart.report.words import to_plain_text

SHOWN = {
    "method": (METHODS, ("name", "needs", "form", "allocation", "refit", "exact_for", "paper")),
    "form": (FORMS, ("form", "paper")),
    "embeddings": (EMBEDDINGS, ("needs", "exact_for", "paper")),
    "recovery": (RECOVERIES, ("name", "needs_teacher", "title", "paper")),
}


@pytest.mark.parametrize(("registry", "attributes"), SHOWN.values(), ids=SHOWN)
def test_what_is_read_from_source_equals_the_object(registry, attributes):
    for name, live in registry.items():
        about = registry.about(name)
        assert {key: about[key] for key in attributes} == {key: getattr(live, key) for key in attributes}
        assert about["doc"] == (live.__doc__ or "").strip().partition("\n")[0] or registry is METHODS
        for key, value in about.items():  # a value that could not be read is left out, not guessed
            assert key == "doc" or getattr(live, key) == value, (name, key)


def test_needs_shown_equal_those_of_the_method():
    lines = to_plain_text(list_methods("svd"), width=2000).splitlines()
    shown = {line.split()[0]: line for line in lines if line and line[0] != " "}
    for name, method in METHODS.items():
        needs = ["data"] * method.needs_data + ["gradients"] * method.needs_gradients or ["nothing"]
        assert f"  {' + '.join(needs)}  " in shown[name].replace("(default)", "")
    assert "svd (default)" in shown["svd"]
    assert "  loss, curves measured" in shown["lems"]
    assert "  lowrank, sliced  " in shown["modegpt"]
    assert "  joint, sliced  " in shown["eckart"]
    assert "  lowrank  " in shown["kfac"]


def test_programs_get_the_same_as_json():
    found = json.loads(json.dumps(describe_catalog()))
    assert [*found["methods"]] == [*METHODS]
    assert found["methods"]["eckart"]["needs"] == ["gradients", "gram"]
    assert found["recoveries"]["lora"]["paper"] == RECOVERIES["lora"].paper


def test_own_method_is_shown_with_the_others(monkeypatch):
    monkeypatch.setattr(METHODS, "_added", {})
    method = METHODS["drone"].__class__(**{**vars(METHODS["drone"]), "name": "mine", "exact_for": "my own error"})
    METHODS.add("mine", method)
    assert "my own error" in to_plain_text(list_methods("svd"), width=400)


def test_catalog_holds_every_name_and_imports_no_torch():
    code = "import sys; sys.modules['eckart'] = type(sys)('eckart'); sys.modules['eckart'].__path__ = [sys.argv[1]]\n"
    code += "from eckart.report import catalog, words\n"
    code += "print(words.to_plain_text(catalog.list_catalog('eckart'), 2000))\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    package = sys.modules["eckart"].__path__[0]
    shown = subprocess.run([sys.executable, "-c", code, package], capture_output=True, text=True, check=True).stdout
    first = [line.split()[0] for line in shown.splitlines() if line]
    for registry, _ in SHOWN.values():
        for name in registry:
            assert first.count(name) >= 1, name
    assert "k (m + n - k) numbers" in shown
    assert to_plain_text(list_catalog("eckart"), 2000) == shown.rstrip()


def test_the_catalog_begins_with_what_to_take_and_shows_no_marks():
    shown = to_plain_text(list_catalog("drone"), 2000)
    assert shown.startswith("The default is drone: it need not be named, ")
    assert "`" not in shown
    assert "y = B (A x) + b, stored as k (m + n) numbers" in shown
