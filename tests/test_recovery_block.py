"""Blocks of a published model trained one after another: better outputs, resumed with the same bits, refusals."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME
from folders import model_folders
from test_calibration_backward import without_backward
from torch import nn
from typer.testing import CliRunner

import eckart
from eckart.cli.app import app
from eckart.compression import refine_blocks
from eckart.data import Batch, load_data
from eckart.data.inference import forward
from eckart.errors import ModelError, UsageError
from eckart.model import factored_modules
from eckart.recovery import Block, RecoveryContext
from eckart.recovery.recipe import TuneRecipe
from eckart.storage.cache import Cache

QUICK: dict[str, Any] = {"batch_size": 8, "max_seq_length": 32, "num_samples": 48, "eval_samples": 8}


def trained(student: Any, teacher: Any, batches: list[Batch], **options: Any) -> tuple[Any, Block, list[str]]:
    """A copy of the student whose blocks are trained, and the recovery that did it."""
    recovery, student = Block(**{"epochs": 2, **options}), copy.deepcopy(student).eval()
    context = RecoveryContext(teacher, "causal", TuneRecipe(), 0)
    with torch.no_grad():
        recovery.solve(student, context, batches, Cache(memory=sys.maxsize, folder=None))
    return student, recovery, context.notes


def distance(student: Any, teacher: Any, batches: list[Batch]) -> float:
    """Of what the models put out."""
    with torch.no_grad():
        pairs = [[forward(model, batch.inputs)[0] for model in (student, teacher)] for batch in batches]
    return sum(float((one - other).square().sum()) for one, other in pairs)


@pytest.mark.parametrize(("name", "form"), [
    ("llama", "pivoted-joint"), ("gpt2", "sliced"), ("bert", "kronecker"), ("t5", "lowrank"), ("mixtral", "lowrank"),
])  # fmt: skip
def test_every_block_comes_nearer_in_any_form(name: str, form: str):
    architecture = BY_NAME[name]
    teacher = architecture.model()
    batches = load_data(architecture.batches(rows=8, count=4), model=teacher).batches
    held = load_data(architecture.batches(rows=8, count=2, seed=5), model=teacher).batches
    method = "svd" if form in ("kronecker", "lowrank") else "drone"
    student = eckart.compress(teacher, data=batches, method=method, form=form, keep=0.5, refit=False).model
    before = {key: value.clone() for key, value in student.state_dict().items()}
    after, recovery, _ = trained(student, teacher, batches)
    *first, last = recovery.fits.values()  # of the last one other errors are counted, which two epochs may not mend
    assert all(fit is not None and fit.after < fit.before for fit in first)
    assert last is None or last.after < last.before
    assert distance(after, teacher, held) < distance(student, teacher, held)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert factored_modules(after).keys() == factored_modules(student).keys()
    assert after.state_dict().keys() == before.keys()
    integers = [key for key, value in before.items() if not value.is_floating_point()]
    assert all(torch.equal(after.state_dict()[key], before[key]) for key in integers)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folders(tmp_path_factory.mktemp("block"), 0.4, ["yes\t1", "no\t0"] * 20)


def tune(place: Path, **options: Any) -> Any:
    given = {"data": place / "text.txt", "teacher": place / "llama", "recovery": Block(epochs=2), **QUICK}
    return eckart.tune(place / "llama-40", **given | options)


def test_the_command_publishes_what_it_measured(place: Path, tmp_path: Path):
    words = ["tune", place / "llama-40", "--recovery", "block", "--teacher", place / "llama", "--data",
             place / "text.txt", "--num-samples", 60, "--max-seq-length", 32, "--recovery-option", "epochs=2",
             "--output-dir", tmp_path / "out"]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "2 of 2 blocks trained on 1.92 k tokens, on cpu" in done.output
    assert not (tmp_path / "out.partial").exists()


def test_an_interrupted_run_goes_on_from_the_last_block_with_the_same_bits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = tune(place).model.state_dict()
    calls: list[int] = []
    own = refine_blocks.train_block

    def stopping(parameters: list[nn.Parameter], *rest: Any) -> Any:
        calls.append(len(parameters))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(parameters, *rest)

    monkeypatch.setattr(refine_blocks, "train_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        tune(place, output_dir=tmp_path / "out")
    assert (tmp_path / "out.partial").exists()
    resumed = tune(place, output_dir=tmp_path / "out")
    assert len(calls) == 3
    assert all(torch.equal(value, whole[key]) for key, value in resumed.model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_trained_is_refused_with_the_reason():
    architecture = BY_NAME["albert"]
    model = architecture.model()
    batches = load_data(architecture.batches(rows=8), model=model).batches
    with pytest.raises(ModelError, match=r"one and the same block.*--recovery distil"):
        trained(model, model, batches)
    with pytest.raises(UsageError, match="too little text"):
        trained(model, model, [batches[0].rows(0, 1)])
    llama = BY_NAME["llama"]
    with pytest.raises(ModelError, match=r"runs 3 blocks and the student 2.*--teacher MODEL"):
        trained(llama.model(), llama.model(num_hidden_layers=3), load_data(llama.batches(), model=model).batches)
    bare, smaller = without_backward(), without_backward()
    with torch.no_grad():
        smaller.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    with pytest.raises(ModelError, match=r"no backward pass runs .*this kernel has no backward pass.*--recovery refit"):
        trained(smaller, bare, load_data(llama.batches(4, 4), model=bare).batches)
    with pytest.raises(UsageError, match="epochs must be"):
        Block(epochs=0)
