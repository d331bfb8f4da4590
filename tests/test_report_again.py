"""The line of a page that makes its folder again: what it leaves to be said."""

import reports

from eckart.report.page.again import make_again


def compression(**recipe) -> str:
    found = reports.compression()
    found["data"] = {"source": recipe.pop("source", "list")}
    return make_again(
        {**found, "recipe": {"method": "eckart", "model": "org/model", "data": None, **recipe}}, "smol 60"
    )


def tuning(**recipe) -> str:
    return make_again({"kind": "tune", "recipe": {"recovery": "distil", **recipe}, "data": {"source": "list"}}, "own")


def test_what_is_named_needs_no_words():
    lines = compression(data="text.txt").splitlines()
    assert lines[-1] == "eckart compress --config 'smol 60/eckart/recipe.yaml' --output-dir 'smol 60-again'"
    assert (
        "# it reads model org/model, data text.txt: run it in the folder where it was run, if these are relative "
        in (f"{lines[0]} ")
    )
    assert lines[1] == "# smol 60: the path of this folder from there"


def test_absolute_paths_stay_where_they_are():
    assert "/home/someone" not in compression(model="/home/someone/model", data="/home/someone/text.txt")


def test_the_default_data_and_none_need_no_words():
    assert "DATA" in compression()
    assert "DATA" not in compression(source="Salesforce/wikitext")
    assert "DATA" not in compression(source=None)


def test_objects_of_a_tuning_are_asked_for():
    asked = "MODEL --config own/eckart/recipe.yaml --teacher TEACHER --data DATA"
    assert tuning().endswith(f"eckart tune {asked} --output-dir own-again")
    assert "TEACHER" not in tuning(recovery="lora")
    assert "TEACHER" not in tuning(teacher="org/teacher")
    assert "MODEL --config" not in tuning(model="own")


def test_what_only_one_process_knows_is_named():
    assert "class of your own" not in compression()
    for name in ("method", "metric", "form"):
        assert f"{name} mine is a class of your own: register it" in compression(**{name: "mine"})
    assert "recovery python:here.Own is a class of your own" in tuning(recovery="python:here.Own")
