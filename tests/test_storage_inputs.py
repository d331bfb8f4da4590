"""No command and no `save_pretrained` replaces what it has read, or what eckart has not published."""

import json
from pathlib import Path

import pytest
from tiny import llama, place, text
from transformers import AutoTokenizer
from typer.testing import CliRunner

import eckart
from eckart.cli.app import app

SMALL = ["--data", "text.txt", "--num-samples", "4", "--max-seq-length", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its factored copy, its teacher, text, a plan and a run file; a project that is not a model."""
    home = tmp_path_factory.mktemp("inputs")
    model = llama(num_hidden_layers=1)
    place(model, home / "model")
    place(model, home / "teacher")
    made = eckart.compress(model, AutoTokenizer.from_pretrained(home / "model"), method="svd", keep=0.5)
    made.save_pretrained(home / "small")
    for name in ("plans", "texts", "held", "runs", "project"):
        (home / name).mkdir()
    (home / "plans/plan.json").write_text(json.dumps(made.plan.to_json()))
    (home / "texts/a.txt").write_text("text\n" * 100)
    (home / "held/a.txt").write_text("text\n" * 100)
    (home / "runs/run.yaml").write_text("seed: 0\n")
    (home / "project/config.json").write_text('{"name": "my web app"}')
    (home / "project/main.py").touch()
    text(home)
    return home


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TUNE = ["tune", "small", "--teacher", "teacher", "--eval-data", "held", "--max-steps", "1", *SMALL]
COMPRESS = ["compress", "model", "--plan", "plans/plan.json", "--config", "runs/run.yaml", *SMALL]

REFUSED = [
    *(
        [*COMPRESS, "--data", "texts", "--output-dir", f]
        for f in ("model", "plans", "runs", "texts", "project", "small")
    ),
    *([*TUNE, "--data", "texts", "--output-dir", f] for f in ("small", "teacher", "texts", "held", "project")),
    [*TUNE, "--config", "runs/run.yaml", "--output-dir", "runs"],
    ["export", "small", "--output-dir", "small"],
    ["export", "small", "--output-dir", "project"],
    ["demo", "--output-dir", "project"],
]  # fmt: skip


@pytest.mark.parametrize("words", REFUSED, ids=lambda words: f"{words[0]} onto {words[-1]}")
def test_overwrite_never_replaces_an_input_or_a_foreign_folder(words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if words[0] == "compress" and words[-1] == "small":  # what eckart has published, with one file more
        (folder / "small/notes.txt").write_text("mine")
    before = contents(folder)
    done = CliRunner().invoke(app, [*words, "--overwrite"])
    after = contents(folder)
    (folder / "small/notes.txt").unlink(missing_ok=True)
    assert done.exit_code == 1, done.output
    said = " ".join(done.output.split())
    assert "Inputs are never replaced" in said or "--overwrite deletes only what eckart has published" in said
    assert before == after


@pytest.mark.parametrize("path", ["model/config.json", "project/config.json", "texts/a.txt", "model/new.json"])
@pytest.mark.parametrize(
    "words",
    [["inspect", "model"], ["eval", "model", "--data", "texts"],
     ["compare", "model", "--methods", "svd", "--data", "texts"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_report_never_replaces_an_input_or_a_foreign_file(words, path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = contents(folder)
    done = CliRunner().invoke(app, [*words, "--json", path])
    assert done.exit_code == 2, done.output
    assert "Choose another file for the report" in " ".join(done.output.split())
    assert before == contents(folder)


def test_results_never_replace_what_they_were_made_from(folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = contents(folder)
    loaded = eckart.load("model")
    results = [
        eckart.compress(loaded, method="svd", keep=0.5),
        eckart.tune("small", data="text.txt", recovery="full", num_samples=4, max_seq_length=16, max_steps=1),
    ]
    for result, output in zip(results, ("model", "small"), strict=True):
        with pytest.raises(eckart.EckartError, match="Inputs are never replaced"):
            result.save_pretrained(output, overwrite=True)
        with pytest.raises(eckart.EckartError, match=r"main\.py lie there"):
            result.save_pretrained("project", overwrite=True)
    assert before == contents(folder)
