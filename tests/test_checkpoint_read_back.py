"""Published folders that are read back: before they are put in place, and whenever somebody asks."""

import json
import os
import shutil
from pathlib import Path

import pytest
from architectures import BY_NAME
from safetensors.torch import load_file, save_file
from tiny import llama, place, text

import eckart
from eckart.checkpoint.load import load
from eckart.checkpoint.read_back import read_back, read_back_in_fresh_process, verify_folder
from eckart.cli.app import app
from eckart.errors import CheckpointError, NumericalError


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    place(llama(num_hidden_layers=2), home / "llama")
    text(home)
    eckart.compress(home / "llama", method="svd", form="pivoted", keep=0.6, output_dir=home / "small")
    return home


@pytest.fixture
def copy(home, tmp_path) -> Path:
    return shutil.copytree(home / "small", tmp_path / "small")


def run(capsys, *words) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        app([str(word) for word in words])
    found = capsys.readouterr()
    return int(left.value.code or 0), " ".join(f"{found.out} {found.err}".split())


# -- eckart verify -----------------------------------------------------------------------------------


def test_folder_as_it_was_published_is_whole(home, capsys, tmp_path):
    code, said = run(capsys, "verify", home / "small", "--json", tmp_path / "found.json")
    assert code == 0
    assert "is whole" in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["problems"] == found["notes"] == []
    model = load(home / "small")
    assert found["compared"] == sum(tensor.numel() > 0 for tensor in model.state_dict().values())
    assert found["files"] == sum(path.is_file() for path in (home / "small").rglob("*")) - 1


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x40
    path.write_bytes(raw)


CHANGES = {
    "a bit in the middle of the weights": (lambda folder: flip(folder / "model.safetensors", -70_000),
                                           ["model.safetensors was changed", "the numbers of 1 tensors are others"]),
    "a tokenizer that was edited": (lambda folder: flip(folder / "tokenizer.json", 100), ["tokenizer.json was ch"]),
    "a file that was added": (lambda folder: (folder / "notes.txt").write_text("mine"), ["notes.txt was not writ"]),
    "a file that is gone": (lambda folder: (folder / "README.md").unlink(), ["README.md is gone"]),
    "a report that was edited": (lambda folder: flip(folder / "eckart/report.json", 50), ["report.json was chang"]),
    "a link in place of a file": (lambda folder: as_link(folder / "README.md"), ["README.md was changed"]),
    "weights that are cut off": (lambda folder: os.truncate(folder / "model.safetensors", 90_000),
                                 ["model.safetensors was changed", "truncated"]),
}  # fmt: skip


def as_link(path: Path) -> None:
    shutil.move(path, path.parent.parent / "moved")
    path.symlink_to(path.parent.parent / "moved")


@pytest.mark.parametrize("case", CHANGES)
def test_whatever_was_changed_is_named(case, copy, capsys):
    change, words = CHANGES[case]
    change(copy)
    code, said = run(capsys, "verify", copy)
    assert code == 1
    assert "is not what eckart published" in said
    for word in words:
        assert word in said


def test_numbers_that_load_as_others_are_found_without_the_list_of_files(copy):
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert read_back(copy).problems == ["the numbers of 1 tensors are others: model.norm.weight"]


def test_folder_that_eckart_did_not_publish_is_refused(home, capsys, tmp_path):
    for folder in (home / "llama", tmp_path / "nowhere"):
        code, said = run(capsys, "verify", folder)
        assert code == 1
        assert "Give" in said


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mixtral"])
def test_every_kind_of_model_is_read_back_as_it_was(name, tmp_path):
    """Ties, experts that are fused, convolutions, models of two sides."""
    model = BY_NAME[name].model()
    result = eckart.compress(model, method="svd", keep=0.6, output_dir=tmp_path / "out")
    found = verify_folder(result.folder)
    assert (found.problems, found.notes) == ([], [])
    assert found.compared > 0


# -- before it is put in place -----------------------------------------------------------------------


def test_result_is_read_back_in_a_fresh_process_before_it_is_published(reads_back, home, tmp_path, capsys, monkeypatch):
    words = ["compress", home / "llama", "--method", "svd", "--keep", "0.6"]
    monkeypatch.setattr("eckart.checkpoint.read_back.logger.info", print)
    code, said = run(capsys, *words, "--output-dir", tmp_path / "out")
    assert code == 0, said
    assert "tensors read back in a fresh process" in said
    # What is written differs from what is in memory: one number, after the record was made.
    monkeypatch.setattr("eckart.checkpoint.save.write_record", spoiled)
    code, said = run(capsys, *words, "--output-dir", tmp_path / "bad")
    assert code == 1
    assert "is not what was in memory" in said
    assert "the numbers of 1 tensors are others" in said
    assert sorted(os.listdir(tmp_path)) == ["out"]
    code, said = run(capsys, *words, "--output-dir", tmp_path / "bad", "--no-verify")
    assert code == 0
    assert (tmp_path / "bad").is_dir()


def spoiled(folder: Path, model) -> None:
    from eckart.checkpoint.read_back import write_record

    write_record(folder, model)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_process_that_does_not_even_start_is_no_success(reads_back, home, monkeypatch):
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(CheckpointError, match=r"(?s)is not what was in memory: it could not be read .*it ended with 1"):
        read_back_in_fresh_process(home / "small")


# -- strict ------------------------------------------------------------------------------------------


def test_strict_makes_every_fallback_an_error(home, tmp_path):
    asked = {"data": str(home / "text.txt"), "num_samples": 4, "max_seq_length": 16, "form": "kronecker"}
    notes = eckart.compress(home / "llama", **asked).report["notes"]
    assert "the refit was left out: form kronecker cannot be fitted again" in notes
    with pytest.raises(NumericalError, match=r"--strict: \d+ things were not done as asked") as refusal:
        eckart.compress(home / "llama", **asked, strict=True, output_dir=tmp_path / "out")
    assert notes[0] in str(refusal.value)
    assert os.listdir(tmp_path) == []
    assert eckart.compress(home / "llama", method="svd", keep=0.6, strict=True).report["notes"] == []


def test_strict_tuning_refuses_what_was_not_used(home, tmp_path):
    with pytest.raises(NumericalError, match=r"(?s)--strict: .*the teacher was not used for training"):
        eckart.tune(
            home / "llama", teacher=home / "llama", data=str(home / "text.txt"), recovery="full", max_steps=1,
            strict=True, max_seq_length=16, num_samples=4, output_dir=tmp_path / "out",
        )  # fmt: skip
    assert os.listdir(tmp_path) == []
