"""Compression by several processes: the result of one process, one output, and an end for all if one of them fails."""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Done, Server, Workdir, llama, place, published, text
from torch import Tensor

import eckart
from eckart.compression.open_workspace import remove_other_journals
from eckart.model import dense_weight, factored_modules
from eckart.storage.journal import Journal
from eckart.storage.lock import OutputLock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
CASES: dict[str, tuple[str, ...]] = {
    "drone streamed": ("--method", "drone", "--stream", "on"),
    "kfac streamed": ("--method", "kfac", "--stream", "on"),
    "eckart": ("--refit", "--stream", "off"),
    "eckart streamed": ("--refit", "--stream", "on", "--form", "joint", "--allocation", "uniform"),
    "basis-sharing streamed": ("--method", "basis-sharing", "--stream", "on"),
}
KILLED = -9
TORCHRUN = """
import runpy, sys
from torch.distributed import run

def work(*arguments):
    sys.argv = list(arguments[arguments.index("eckart"):])
    try:
        runpy.run_module("eckart", run_name="__main__", alter_sys=True)
    except SystemExit as left:
        if left.code:
            raise RuntimeError(f"eckart ended with {left.code}") from left

# Its processes are forks, which have imported the libraries; all else is as torchrun does it.
launch = run.elastic_launch
run.elastic_launch = lambda config, entrypoint: launch(config, work)
run.main(["--standalone", "--nproc_per_node=2", "--start_method=fork", "-m", "eckart", *sys.argv[1:]])
"""


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def products(folder: Path) -> dict[str, Tensor]:
    """The weights that the factors of all sites stand for."""
    return {name: dense_weight(form).double() for name, form in factored_modules(eckart.load(folder)).items()}


class Worlds:
    """Commands in worlds of several processes, and what an undisturbed one gives."""

    def __init__(self, server: Server, workdir: Workdir, folder: Path) -> None:
        self.server = server
        self.workdir = workdir
        self.folder = folder
        self.made: dict[tuple[str, int], tuple[Path, list[Done]]] = {}

    def words(self, home: Path, case: str, *more: Any) -> list[str]:
        return self.workdir.words(home / "out", "--dtype", "float32", *CASES[case], *more)

    def run(
        self, words: list[str], size: int = 2, *, rank: int = 0, at: int | None = None, what: str = "kill"
    ) -> list[Done]:
        """A command in so many processes; at a tick of one of them something happens."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = [
            self.server.start(
                words,
                at if i == rank else None,
                what,
                environ={**shared, "RANK": str(i), "LOCAL_RANK": str(i)} if size > 1 else {},
            )
            for i in range(size)
        ]
        return [self.server.wait(one) for one in started]

    def undisturbed(self, case: str, size: int = 2) -> tuple[Path, list[Done]]:
        """What a world publishes that nobody disturbs; all its processes end well."""
        if (case, size) not in self.made:
            home = self.folder / f"{case}-{size}"
            home.mkdir()
            done = self.run(self.words(home, case), size)
            assert [one.code for one in done] == [0] * size, [one.said for one in done]
            assert [one.said for one in done[1:]] == [""] * (size - 1)  # the first one alone speaks
            assert listed(home) == ["out"]  # no journal, no lock, nothing of others
            self.made[case, size] = home / "out", done
        return self.made[case, size]

    def finish(self, case: str, home: Path, *more: Any) -> list[Done]:
        """Run again; it publishes what an undisturbed world of two does."""
        done = self.run(self.words(home, case, *more))
        assert [one.code for one in done] == [0, 0], [one.said for one in done]
        found, expected = published(home / "out"), published(self.undisturbed(case)[0])
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
        assert listed(home) == ["out"]
        return done


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Workdir:
    folder = tmp_path_factory.mktemp("workdir")
    place(llama(num_hidden_layers=2), folder / "llama")
    source = text(folder)
    source.write_bytes(source.read_bytes()[:8000])  # all that is read
    return Workdir(folder)


@pytest.fixture(scope="module")
def worlds(server, workdir, tmp_path_factory) -> Worlds:
    return Worlds(server, workdir, tmp_path_factory.mktemp("worlds"))


# -- the result of one -------------------------------------------------------------------------------


RESULTS = [
    ("eckart", 4),  # more processes than batches of text
    ("drone streamed", 2),
    ("kfac streamed", 2),
    ("eckart streamed", 2),
    ("basis-sharing streamed", 2),
]


@pytest.mark.parametrize(("case", "size"), RESULTS)
def test_several_processes_give_the_result_of_one(case, size, worlds):
    alone, _ = worlds.undisturbed(case, 1)
    folder, done = worlds.undisturbed(case, size)
    plans = [json.loads((home / "eckart/plan.json").read_text())["sites"] for home in (alone, folder)]
    predicted = [{site: entry.pop("predicted_loss", None) for site, entry in plan.items()} for plan in plans]
    assert plans[0] == plans[1]
    for site, loss in predicted[0].items():
        assert predicted[1][site] == (None if loss is None else pytest.approx(loss, rel=1e-3)), site
    expected, found = products(alone), products(folder)
    assert expected.keys() == found.keys() != set()
    for name, product in expected.items():
        assert (found[name] - product).norm() <= 1e-4 * product.norm(), name
    reports = [json.loads((home / "eckart/report.json").read_text()) for home in (alone, folder)]
    for name in ("data", "kept", "sizes", "method", "curvature", "notes"):
        assert reports[1][name] == reports[0][name], name
    assert reports[1]["data"]["calibration_tokens"] == 12 * 32  # of the whole text
    one, other = (report["quality"]["agreement"]["kl"] for report in reports)
    assert other == pytest.approx(one, rel=1e-3)
    assert "published in" in done[0].said


@pytest.mark.parametrize("case", ["drone streamed", "kfac streamed"])
def test_text_and_sites_are_divided_between_processes(case, worlds):
    alone = worlds.undisturbed(case, 1)[1][0]
    first, second = worlds.undisturbed(case)[1]
    assert first["solve_site"] + second["solve_site"] == alone["solve_site"] == 14
    assert min(first["solve_site"], second["solve_site"]) >= 4  # the costs of the sites differ
    if case == "kfac streamed":
        probe = 2
        calls = [one["LayerwiseRunner.run_block_backward"] - probe for one in (first, second)]
        assert sorted(calls) == [2, 4]  # a batch and two, two blocks each
        assert alone["LayerwiseRunner.run_block_backward"] - probe == sum(calls)


# -- an end for all ----------------------------------------------------------------------------------


def refused(done: list[Done], *parts: str) -> None:
    """All ended, none with a traceback, and somebody said why."""
    for one in done:
        assert one.code in (1, 2), (one.code, one.said)
        assert "Traceback" not in one.said
    said = " ".join(one.message for one in done)
    for part in parts:
        assert part in said


def test_error_of_all_processes_ends_all_without_traceback(worlds, tmp_path):
    (tmp_path / "empty.txt").touch()
    for name, said in (("gone.txt", "no such file"), ("empty.txt", "no text")):
        refused(worlds.run(worlds.words(tmp_path, "drone streamed", "--data", tmp_path / name)), f"{name}: {said}")
        assert listed(tmp_path) == ["empty.txt"]


def test_existing_output_is_reported_once(worlds, tmp_path):
    (tmp_path / "out").mkdir()
    done = worlds.run(worlds.words(tmp_path, "drone streamed"))
    refused(done, "is there already")
    assert done[1].said == ""
    assert listed(tmp_path) == ["out"]


def test_locked_output_is_reported_once(worlds, tmp_path):
    with OutputLock(tmp_path / "out"):
        done = worlds.run(worlds.words(tmp_path, "drone streamed"))
    refused(done, f"Another run (pid {os.getpid()}")
    assert done[1].said == ""


def moment(done: Done, name: str, part: float) -> int:
    """The tick at which something has come so far: 0 is the first time, 1 the last."""
    times = [i for i, tick in enumerate(done.ticks, 1) if tick == name]
    return times[int(part * (len(times) - 1))]


def test_full_disk_of_one_process_ends_all_and_the_run_resumes(worlds, tmp_path):
    case = "kfac streamed"
    at = moment(worlds.undisturbed(case)[1][1], ">LayerwiseRunner.run_block_backward", 0.5)
    done = worlds.run(worlds.words(tmp_path, case), rank=1, at=at, what="full")
    refused(done, "is full", "run the same command again")
    assert "out" not in listed(tmp_path)
    assert "out.partial" in listed(tmp_path)
    worlds.finish(case, tmp_path)


def test_torchrun_resumes_a_run_of_which_one_process_was_interrupted(worlds, tmp_path):
    """A terminal interrupts all processes; here only one is, and the other loses the connection."""
    case = "kfac streamed"
    at = moment(worlds.undisturbed(case)[1][0], ">LayerwiseRunner.run_block_backward", 0.7)
    words = worlds.words(tmp_path, case)
    done = worlds.run(words, at=at, what="interrupt")
    assert done[0].code == 130
    assert done[1].code == 1
    assert "Traceback" not in done[0].said + done[1].said
    assert "out" not in listed(tmp_path)
    assert "out.partial" in listed(tmp_path)
    said = worlds.server.run_code(TORCHRUN, *words)
    assert said.count("published in") == said.count("against the original") == 1
    assert listed(tmp_path) == ["out"]
    expected = products(worlds.undisturbed(case)[0])
    for name, product in products(tmp_path / "out").items():
        torch.testing.assert_close(product, expected[name])


def kill(worlds: Worlds, case: str, home: Path, rank: int, name: str, part: float) -> None:
    """Kill one process; the other ends by itself, and nothing is published."""
    at = moment(worlds.undisturbed(case)[1][rank], name, part)
    done = worlds.run(worlds.words(home, case), rank=rank, at=at)
    assert done[rank].code == KILLED
    assert done[1 - rank].code == 1, done[1 - rank].said
    assert "Traceback" not in done[1 - rank].said
    assert "out" not in listed(home)


def test_kill_of_one_process_ends_all_and_the_run_resumes(worlds, tmp_path):
    kill(worlds, "eckart streamed", tmp_path, 1, "<Journal.write", 0.9)
    worlds.finish("eckart streamed", tmp_path)


def copy_unfinished(source: Path, target: Path) -> Path:
    for folder in source.glob("*.partial"):
        shutil.copytree(folder, target / folder.name)
    return target


def test_processes_that_have_stored_different_entries_resume(worlds, tmp_path):
    """Killed between two writes of the same entry: once the first process lacks entries, once another does."""
    case = "eckart streamed"
    kill(worlds, case, tmp_path, 0, ">_sync", 0.0)
    kept = copy_unfinished(tmp_path, tmp_path.with_name("kept"))
    for stage in ("refitted", "stored"):
        for path in sorted((tmp_path / "out.partial" / "entries" / stage).iterdir())[-1:]:
            path.unlink()
    done = worlds.finish(case, tmp_path)
    assert done[0]["Journal.write"] == 2
    assert done[1]["Journal.write"] == 0

    shutil.rmtree(tmp_path / "out")
    copy_unfinished(kept, tmp_path)
    shutil.rmtree(tmp_path / "out.rank1.partial")
    done = worlds.finish(case, tmp_path)
    assert done[0]["Journal.write"] == 0


def test_main_process_removes_no_journal_of_a_process_that_still_runs(tmp_path):
    """Each process removes its own at the end; two that removed one folder at the same time left it behind."""
    for rank in (1, 2, 10):
        Journal.open(tmp_path / f"out.rank{rank}", {"process": rank})
    foreign = tmp_path / "out.rank3.partial"
    foreign.mkdir()
    remove_other_journals(tmp_path / "out", at_least=2)
    assert listed(tmp_path) == ["out.rank1.partial", foreign.name]
    remove_other_journals(tmp_path / "out")
    assert listed(tmp_path) == [foreign.name]


def test_unfinished_run_refuses_other_arguments_resumes_and_restarts(worlds, tmp_path):
    case = "drone streamed"
    kill(worlds, case, tmp_path, 1, ">solve_site", 0.6)
    assert {"out.partial", "out.rank1.partial"} <= set(listed(tmp_path))
    refused(worlds.run(worlds.words(tmp_path, case), 1), "processes: 2 then, 1 now", "--restart")
    refused(worlds.run(worlds.words(tmp_path, case, "--keep", 0.5)), "options.keep: 0.7 then, 0.5 now")
    kept = copy_unfinished(tmp_path, tmp_path.with_name("interrupted"))

    def solved(done: list[Done]) -> int:
        return sum(one["solve_site"] for one in done)

    everything = solved(worlds.undisturbed(case)[1])
    assert 0 < solved(worlds.finish(case, tmp_path)) < everything
    shutil.rmtree(tmp_path / "out")
    copy_unfinished(kept, tmp_path)
    assert solved(worlds.finish(case, tmp_path, "--restart")) == everything
