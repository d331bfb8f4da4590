"""Blocks that are trained in a run which is killed and resumes, block by block, and by two processes."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Done, Workdir, llama, place, published, text

import eckart

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
REFINE = ("--method", "drone", "--keep", "0.5", "--refine", "--dtype", "float32")
KILLED = -9


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    folder = tmp_path_factory.mktemp("workdir")
    place(llama(num_hidden_layers=2), folder / "llama")
    text(folder)
    return Workdir(folder)


@pytest.fixture(scope="module")
def undisturbed(server: Any, workdir: Workdir, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """What a run publishes that nobody disturbs."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = server(workdir.words(output, *REFINE, "--stream", "on"))
    assert done.code == 0, done.said
    return output, done


def distances(folder: Path) -> dict[str, float]:
    report = json.loads((folder / "eckart/report.json").read_text())
    return {row["stage"]: row["distance"] for row in report["stages"] if row["kept"]}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in eckart.load(folder).state_dict().items()}


def test_block_by_block_it_does_what_it_does_in_memory(server, workdir, undisturbed, tmp_path):
    done = server(workdir.words(tmp_path / "out", *REFINE, "--stream", "off"))
    assert done.code == 0, done.said
    one, other = distances(undisturbed[0]), distances(tmp_path / "out")
    assert other == pytest.approx(one, rel=1e-3)
    assert one["refinement"] < one["factors"]
    assert "2 blocks" in done.said
    assert "refinement" in done.said


def test_killed_in_a_block_it_goes_on_from_the_last_one_with_the_same_bits(server, workdir, undisturbed, tmp_path):
    ticks = undisturbed[1].ticks
    trained = [i + 1 for i, tick in enumerate(ticks) if tick == ">train_block"]
    assert len(trained) == 2
    words = workdir.words(tmp_path / "out", *REFINE, "--stream", "on")
    assert server(words, trained[1] + 1).code == KILLED  # trained, and not written
    done = server(words)
    assert done.code == 0, done.said
    assert done["train_block"] == 1
    assert published(tmp_path / "out") == published(undisturbed[0])


def test_killed_in_a_distillation_nothing_is_published_and_the_same_command_ends_as_if_it_had_not_been(
    server, workdir, tmp_path
):
    words = ("--method", "drone", "--keep", "0.5", "--distil", "--dtype", "float32")
    one, other = (tmp_path / name / "out" for name in ("whole", "killed"))
    for folder in (one, other):
        folder.parent.mkdir()
    whole = server(workdir.words(one, *words))
    assert whole.code == 0, whole.said
    trained = next(i for i, tick in enumerate(whole.ticks) if tick == "<train_block")
    assert server(workdir.words(other, *words), trained + 1).code == KILLED
    assert not other.exists()
    done = server(workdir.words(other, *words))
    assert done.code == 0, done.said
    assert published(other) == published(one)


def test_two_processes_give_the_result_of_one(server, workdir, undisturbed, tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = workdir.words(tmp_path / "out", *REFINE, "--stream", "on")
    started = [server.start(words, environ={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(2)]
    ended = [server.wait(one) for one in started]
    assert [one.code for one in ended] == [0, 0], [one.said for one in ended]
    assert distances(tmp_path / "out") == pytest.approx(distances(undisturbed[0]), rel=1e-3)
    one, other = weights(undisturbed[0]), weights(tmp_path / "out")
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (other[name] - value).norm() <= 1e-2 * value.norm() + 1e-6, name
