"""Options that do not go together: refused with the command that was meant."""

from __future__ import annotations

import os

import pytest
from folders import model_folders
from typer.testing import CliRunner

from eckart.cli.app import app
from eckart.compression.recipe import Recipe
from eckart.config import check_recipe
from eckart.errors import UsageError
from eckart.methods import METHODS
from eckart.recovery import RECOVERIES
from eckart.recovery.recipe import make_tune_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, the same factored, text and labeled rows."""
    return model_folders(tmp_path_factory.mktemp("ways"), 0.5, [f"row {i}\t{i % 2}" for i in range(20)])


def refused(place, tmp_path, words) -> str:
    """What a command says that is refused as a wrong use, and publishes nothing."""
    files = {"llama", "classifier", "llama-50", "classifier-50", "text.txt", "rows.tsv"}
    words = [str(place / word) if word in files else word for word in words]
    done = CliRunner().invoke(app, [*words, "--output-dir", str(tmp_path / "out")] if "compare" not in words else words)
    assert done.exit_code == 2, done.output
    assert os.listdir(tmp_path) == []
    return " ".join(done.output.replace("│", " ").split())


COMPRESS = {
    "losparse": (["--method", "losparse"], "losparse is trained: eckart tune DIR --recovery losparse --data FILE"),
    "dsee": (["--method", "dsee"], "dsee is trained: eckart tune DIR --recovery dsee"),
    "distil": (["--method", "distil"], "distil is trained: eckart tune DIR --recovery distil --teacher MODEL"),
    "lora": (["--method", "lora"], "lora is trained: eckart tune DIR --recovery lora"),
    "refit": (["--method", "refit"], "eckart tune DIR --recovery refit --teacher MODEL --data FILE --output-dir OUT; "
                                     "while factors are made, any method with --refit"),
    "a metric": (["--metric", "ilkd"], "ilkd is trained: eckart tune DIR --recovery ilkd --teacher MODEL"),
    "a size of one that states its own": (["--method", "kngpt2", "--keep", "0.3"],
                                          "kngpt2 states its own sizes. Leave --keep out, or have ranks chosen for it: "
                                          "--allocation uniform or loss"),
    "the word for allocation": (["--method", "kngpt2", "--allocate", "loss"], "--allocation"),
    "another form of a form": (["--method", "kronecker", "--form", "pivoted"],
                               "kronecker is its form, kronecker, and in another one nothing of it is left. Leave "
                               "--form out, or use a method that any form can store: --method svd --form pivoted"),
    "more than all of the embeddings": (["--method", "svd", "--embeddings", "safe", "--embeddings-keep", "1.5"],
                                        "--embeddings-keep 1.5: a fraction above 0 up to 1 is meant"),
    "too little of the embeddings": (["--method", "svd", "--embeddings", "safe", "--embeddings-keep", "0.0001"],
                                     "--embeddings-keep 0.0001: model.embed_tokens is 8192 x 32"),
    "a part of embeddings that are kept": (["--method", "svd", "--embeddings-keep", "0.5"],
                                           "Name a form for them: --embeddings low"),
    "a refit without inputs": (["--method", "svd", "--refit"], "use --metric drone or kfac, or leave --refit out"),
    "a refit of Kronecker products": (["--method", "drone", "--form", "kronecker", "--refit"], "leave --refit out"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPRESS)
def test_compress_is_refused_with_the_command_that_was_meant(place, tmp_path, case):
    words, expected = COMPRESS[case]
    assert expected in refused(place, tmp_path, ["compress", "llama", *words])


def test_embeddings_that_cannot_be_are_refused_before_any_work(place, tmp_path, monkeypatch):
    monkeypatch.setattr("eckart.compression.prepare.calibrate", lambda *_, **__: pytest.fail("calibrated"))
    words = ["compress", "llama", "--data", "text.txt", "--embeddings", "safe", "--embeddings-keep", "0.0001"]
    assert "Raise --embeddings-keep" in refused(place, tmp_path, words)


def test_compare_is_refused_with_the_command_that_was_meant(place, tmp_path):
    said = refused(place, tmp_path, ["compare", "llama", "--methods", "svd,losparse", "--keep", "0.5"])
    assert "losparse is trained: eckart tune DIR --recovery losparse" in said


TUNE = {
    "a method": ("llama-50", ["--recovery", "svd"], "recovery 'svd' is a method, by which a model is factored: eckart "
                                                    "compress MODEL --method svd"),
    "a recovery by the former flag": ("llama-50", ["--method", "lora"], "write recovery: lora (--recovery lora)"),
    "refit without a teacher": ("llama-50", ["--recovery", "refit"], "recovery refit learns from a teacher. Name the"),
    "losparse of a factored classifier": (
        "classifier-50", ["--recovery", "losparse", "--data", "rows.tsv", "--data-column", "text",
                          "--data-label-column", "label"], "--recovery distil, full or lora",
    ),
    "steps of what has none": (
        "llama-50", ["--recovery", "refit", "--teacher", "llama", "--max-steps", "3"], "Leave --max-steps out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TUNE)
def test_tune_is_refused_with_the_command_that_was_meant(place, tmp_path, case):
    name, words, expected = TUNE[case]
    data = [] if "--data" in words else ["--data", "text.txt"]
    assert expected in refused(place, tmp_path, ["tune", name, *data, *words])


def test_a_method_is_refused_as_a_recovery_and_a_recovery_as_a_method():
    for name in RECOVERIES:
        with pytest.raises(UsageError, match=f"eckart tune DIR --recovery {name} "):
            check_recipe(Recipe, {"method": name})
    for name in METHODS:
        with pytest.raises(UsageError, match=f"eckart compress MODEL --method {name} "):
            make_tune_recipe({"recovery": name})


def test_a_saved_recipe_gives_the_same_plan_again(place, tmp_path):
    """The recipe of a run, defaults included, can be run again."""
    for number, more in enumerate((["--method", "kngpt2"], ["--method", "svd", "--keep", "0.5"],
                                   ["--method", "svd", "--embeddings", "lowrank"])):  # fmt: skip
        first, second = tmp_path / f"a{number}", tmp_path / f"b{number}"
        for words in (
            ["compress", place / "llama", *more, "--output-dir", first],
            ["compress", "--config", first / "eckart/recipe.yaml", "--output-dir", second],
        ):
            done = CliRunner().invoke(app, [str(word) for word in words])
            assert done.exit_code == 0, done.output
        assert (first / "eckart/plan.json").read_text() == (second / "eckart/plan.json").read_text()
