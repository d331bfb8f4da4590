"""A streamed run that is killed, interrupted or runs out of space, and resumes: same bits, and nothing left behind."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME
from safetensors.torch import load_file, save_file
from tiny import Done, Server, Workdir, llama, make_workdir, place, published

from eckart.storage.tensor_file import read_metadata

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
JOINT = ("--form", "joint", "--keep", "0.4", "--allocation", "uniform", "--refit")
METHODS = {"drone": ("--method", "drone"), "kfac": ("--method", "kfac"), "eckart": (), "joint": JOINT}
"""One that walks forwards, one backwards, and the default: backwards, then both models forwards."""

STREAM = ("--stream", "on")
KILLED = -9
LAYERS = 3
BATCHES = 3


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which a killed run leaves."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".out.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def entries(home: Path, stage: str) -> list[Path]:
    """The files of a stage's entries."""
    return sorted((home / "out.partial/entries" / stage).iterdir())


def described(path: Path) -> dict[str, Any]:
    """What the file of an entry says of it, beside its tensors."""
    return json.loads(read_metadata(path)["entry"])


class Runs:
    """Commands on the tiny model, each with its output in a folder of its own."""

    def __init__(self, server: Server, workdir: Workdir, folder: Path) -> None:
        self.server = server
        self.workdir = workdir
        self.folder = folder
        self.whole: dict[str, tuple[Done, dict[str, Any]]] = {}
        self.states: dict[tuple[str, int], Path] = {}

    def words(self, home: Path, method: str, *more: Any) -> list[str]:
        return self.workdir.words(home / "out", *STREAM, *METHODS[method], *more)

    def undisturbed(self, method: str) -> tuple[Done, dict[str, Any]]:
        """A run and what it published."""
        if method not in self.whole:
            home = self.folder / method
            home.mkdir()
            done = self.server(self.words(home, method))
            assert done.code == 0, done.said
            assert listed(home) == ["out"]  # no journal, no lock, no rank
            self.whole[method] = done, published(home / "out")
        return self.whole[method]

    def moment(self, method: str, name: str, part: float = 1.0) -> int:
        """The tick at which something has come so far: 0 is the first time, 1 the last."""
        ticks = self.undisturbed(method)[0].ticks
        times = [i + 1 for i, tick in enumerate(ticks) if tick == name]
        return times[int(part * (len(times) - 1))]

    def unfinished(self, method: str, at: int, home: Path) -> Path:
        """A folder in which a run was killed at a tick."""
        if (method, at) not in self.states:
            state = self.folder / f"{method}-{at}"
            state.mkdir()
            assert self.server(self.words(state, method), at).code == KILLED
            self.states[method, at] = state
        shutil.copytree(self.states[method, at], home, dirs_exist_ok=True)
        return home

    def finish(self, method: str, home: Path, *more: Any) -> Done:
        """Run again; it publishes what an undisturbed run does."""
        done = self.server(self.words(home, method, *more))
        assert done.code == 0, done.said
        assert "Traceback" not in done.said
        same(published(home / "out"), self.undisturbed(method)[1])
        assert listed(home) == ["out"]
        return done

    def refused(self, home: Path, *parts: str, words: list[str], **more: Any) -> str:
        """Run something that ends with a message; it leaves all that is there."""
        before = tree(home)
        done = self.server(words, **more)
        message = done.message
        assert done.code == 1, message
        assert "Traceback" not in message
        for part in parts:
            assert part in message
        assert tree(home) == before
        return message


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Workdir:
    workdir = make_workdir(tmp_path_factory.mktemp("workdir"))
    place(llama(num_hidden_layers=LAYERS), workdir.model)
    return workdir


@pytest.fixture(scope="module")
def runs(server, workdir, tmp_path_factory) -> Runs:
    return Runs(server, workdir, tmp_path_factory.mktemp("runs"))


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


# -- killed ------------------------------------------------------------------------------------------


def test_killed_again_and_again_at_any_moment_it_gives_the_same_bits(runs, tmp_path):
    method = "kfac"
    ticks = len(runs.undisturbed(method)[0].ticks)
    chance = random.Random(method)
    at = ticks // 2
    for _ in range(2):
        done = runs.server(runs.words(tmp_path, method), at)
        if done.code == 0 or (tmp_path / "out").exists():
            break
        assert done.code == KILLED, done.said
        assert "out" not in listed(tmp_path)
        assert (tmp_path / "out.partial").is_dir()
        at = chance.randint(ticks // 20, ticks)
    if not (tmp_path / "out").exists():
        runs.finish(method, tmp_path)
    same(published(tmp_path / "out"), runs.undisturbed(method)[1])


def test_killed_while_publishing(runs, tmp_path):
    assert runs.server(runs.words(tmp_path, "drone"), runs.moment("drone", ">_place", 0.0)).code == KILLED
    assert "out" not in listed(tmp_path)
    done = runs.finish("drone", tmp_path)
    assert "left behind by a run that was killed" in done.said
    assert done["solve_site"] == 0


def test_killed_after_it_was_published(runs, tmp_path):
    words = runs.words(tmp_path, "drone")
    assert runs.server(words, runs.moment("drone", ">rmtree", 0.0)).code == KILLED  # of the journal's folders
    expected = runs.undisturbed("drone")[1]
    same(published(tmp_path / "out"), expected)
    runs.refused(tmp_path, "is there already", "--overwrite", words=words)
    assert runs.finish("drone", tmp_path, "--overwrite")["load_data"] == 1


# -- it resumes -----------------------------------------------------------------------------------------


def solved(home: Path) -> int:
    """Sites that the journal holds."""
    return sum(len(described(path)["content"]["sites"]) for path in entries(home, "solved"))


def test_solved_sites_and_finished_blocks_are_not_done_again(runs, tmp_path):
    method, step = "drone", "LayerwiseRunner.run_block"
    whole = runs.undisturbed(method)[0]
    at = whole.ticks.index("<Journal.write", whole.ticks.index(">solve_site")) + 1
    runs.unfinished(method, at, tmp_path)
    first = solved(tmp_path)
    assert 0 < first < whole["solve_site"]
    done = runs.finish(method, tmp_path)
    assert "resumed, 1 windows are done" in done.said
    assert done["solve_site"] == whole["solve_site"] - first
    assert done[step] == whole[step] - BATCHES  # of the first block
    assert "warning" not in done.said
    assert done["Journal.write"] == whole["Journal.write"] - 2  # the text and the window


def test_forwards_that_wait_are_not_run_again(runs, tmp_path):
    whole = runs.undisturbed("kfac")[0]
    runs.unfinished("kfac", runs.moment("kfac", "<LayerwiseRunner.run_block"), tmp_path)
    done = runs.finish("kfac", tmp_path)
    assert done["solve_site"] == whole["solve_site"]
    # What is tried on one example, and the one call whose kill came before it was kept.
    assert done["LayerwiseRunner.run_block"] <= LAYERS + LAYERS + BATCHES < whole["LayerwiseRunner.run_block"]


def test_refitted_blocks_are_not_refitted_again(runs, tmp_path):
    whole = runs.undisturbed("eckart")[0]
    runs.unfinished("eckart", runs.moment("eckart", ">factorize"), tmp_path)
    assert len(entries(tmp_path, "refitted")) == LAYERS - 1
    done = runs.finish("eckart", tmp_path)
    assert done["solve_site"] == 0
    plan = json.loads((tmp_path / "out/eckart/plan.json").read_text())["sites"]
    last = [name for name, entry in plan.items() if entry["form"] != "dense" and f"layers.{LAYERS - 1}." in name]
    assert 0 < done["factorize"] <= len(last)  # a joint group in one
    assert done["factorize"] < whole["factorize"]
    assert done["LayerwiseRunner.capture_input"] == whole["LayerwiseRunner.capture_input"] / LAYERS
    assert done["LayerwiseRunner.run_block"] < whole["LayerwiseRunner.run_block"] / 2


def test_what_was_refitted_together_is_shared_again(runs, tmp_path):
    """The file holds each input factor once, as where nothing was interrupted."""
    runs.unfinished("joint", runs.moment("joint", ">LayerwiseRunner.capture_input"), tmp_path)
    assert len(entries(tmp_path, "refitted")) == LAYERS - 1
    runs.finish("joint", tmp_path)
    plan = json.loads((tmp_path / "out/eckart/plan.json").read_text())
    assert any("basis" in entry for entry in plan["sites"].values())


def test_nothing_is_computed_again_before_publishing(runs, tmp_path):
    runs.unfinished("drone", runs.moment("drone", ">_sync"), tmp_path)
    done = runs.finish("drone", tmp_path)
    assert done["solve_site"] == done["LayerwiseRunner.capture_input"] == done["Journal.write"] == 0
    assert done["LayerwiseRunner.run_block"] == LAYERS  # one example through each block


# -- damage ------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("method", "name", "stage", "harm", "words", "written"),
    [
        ("drone", ">_sync", "solved", flip, "its checksum differs", 1),
        ("eckart", ">factorize", "refitted", cut, "is truncated", 2),
    ],
)  # fmt: skip
def test_damaged_last_entry_is_made_again(method, name, stage, harm, words, written, runs, tmp_path):
    runs.unfinished(method, runs.moment(method, name), tmp_path)
    damaged = entries(tmp_path, stage)[-1]
    before = [described(path)["name"] for path in entries(tmp_path, stage)[:-1]]
    harm(damaged)
    done = runs.finish(method, tmp_path)
    assert f"warning: {damaged}: it" in done.message
    assert words in done.message
    assert f"resumes after '{before[-1]}'" in done.message
    assert done["Journal.write"] == written


def test_lost_record_of_the_text_is_refused(runs, tmp_path):
    """What was solved may be of other text."""
    runs.unfinished("drone", runs.moment("drone", ">_sync"), tmp_path)
    flip(entries(tmp_path, "text")[-1])
    done = runs.server(runs.words(tmp_path, "drone"))
    assert done.code == 1
    assert "has lost the record of its text" in done.message
    assert "--restart" in done.message


def test_damaged_key_file_starts_from_the_beginning(runs, tmp_path):
    runs.unfinished("drone", runs.moment("drone", ">_sync"), tmp_path)
    cut(tmp_path / "out.partial/journal.json")
    done = runs.finish("drone", tmp_path)
    assert "is damaged: the run starts from the beginning" in done.message
    assert done["solve_site"] == runs.undisturbed("drone")[0]["solve_site"]


@pytest.mark.parametrize(
    ("method", "name", "part", "harm", "lost"),
    [
        ("kfac", ">LayerwiseRunner.run_block_backward", 0.8, cut, 1),  # one is enough
        ("eckart", ">factorize", 1.0, Path.unlink, None),
    ],
)
def test_hidden_states_that_are_lost_are_made_again(method, name, part, harm, lost, runs, tmp_path):
    runs.unfinished(method, runs.moment(method, name, part), tmp_path)
    waiting = sorted((tmp_path / "out.partial/files/waiting").iterdir())
    assert waiting
    for path in waiting[:lost]:
        harm(path)
    whole = runs.undisturbed(method)[0]
    done = runs.finish(method, tmp_path)
    assert done["solve_site"] + done["factorize"] < whole["solve_site"] + whole["factorize"]


# -- another run -------------------------------------------------------------------------------------


CHANGED = {
    "keep": (("--keep", 0.6), "options.keep: 0.7 then, 0.6 now"),
    "method": (("--method", "svd"), 'options.method: "drone" then, "svd" now'),
    "dtype": (("--dtype", "float32"), 'options.dtype: "bfloat16" then, "float32" now'),
    "targets": (("--targets", "*mlp*"), 'options.targets: absent then, ["*mlp*"] now'),
}


@pytest.fixture
def begun(runs, tmp_path) -> Path:
    """A folder with an unfinished run: some sites are solved. It holds the lock of the killed process, too."""
    return runs.unfinished("drone", runs.moment("drone", "<Journal.write", 0.5), tmp_path)


@pytest.mark.parametrize("what", CHANGED)
def test_other_arguments_are_refused(what, runs, begun):
    more, difference = CHANGED[what]
    message = runs.refused(
        begun, "out.partial holds an unfinished run", difference, "Give the same arguments", "--restart",
        "another --output-dir", words=runs.words(begun, "drone", *more),
    )  # fmt: skip
    assert message.count(" then, ") == 1


def copy_of(workdir: Workdir, folder: Path) -> Workdir:
    shutil.copytree(workdir.folder, folder)
    return Workdir(folder)


def test_other_weights_are_refused(runs, begun, tmp_path_factory):
    other = copy_of(runs.workdir, tmp_path_factory.mktemp("other") / "workdir")
    weights = load_file(other.model / "model.safetensors")
    weights["model.norm.weight"][-1] *= 2  # one number
    save_file(weights, other.model / "model.safetensors", {"format": "pt"})
    words = other.words(begun / "out", *STREAM, *METHODS["drone"])
    assert "Give the same" in runs.refused(begun, "--restart", "--output-dir", words=words)


def test_other_text_is_refused(runs, begun, tmp_path_factory):
    other = copy_of(runs.workdir, tmp_path_factory.mktemp("other") / "workdir")
    other.text.write_text("Something else.\n" + other.text.read_text())
    words = other.words(begun / "out", *STREAM, *METHODS["drone"])
    runs.refused(begun, "other text", "Give the same --data", "--restart", "--output-dir", words=words)


def test_other_text_before_anything_is_solved_is_refused_too(runs, tmp_path, tmp_path_factory):
    """The forward pass may have taken hours."""
    runs.unfinished("kfac", runs.moment("kfac", "<LayerwiseRunner.run_block"), tmp_path)
    other = copy_of(runs.workdir, tmp_path_factory.mktemp("other") / "workdir")
    other.text.write_text("Something else.\n" + other.text.read_text())
    runs.refused(tmp_path, "other text", words=other.words(tmp_path / "out", *STREAM, *METHODS["kfac"]))


def test_other_labels_of_the_same_text_are_refused(runs, tmp_path):
    model = place(BY_NAME["bert-classes"].model(vocab_size=8192), tmp_path / "classifier", torch.float32)
    file = tmp_path / "rows.csv"
    lines = runs.workdir.text.read_text().splitlines()
    rows = [line.replace(",", " ").replace('"', " ") for line in lines if line.strip()][:40]

    def labeled(shift: int) -> None:
        content = [f"{row},{(i + shift) % 3}" for i, row in enumerate(rows)]
        file.write_text("\n".join(["sentence,label", *content]))

    home = tmp_path / "home"
    home.mkdir()
    words = ["compress", model, "--data", file, "--data-column", "sentence", "--data-label-column", "label", *STREAM,
             "--method", "kfac", "--num-samples", 24, "--max-seq-length", 16, "--output-dir", home / "out"]  # fmt: skip
    words = list(map(str, words))
    labeled(0)
    assert runs.server(words, ">solve_site").code == KILLED
    labeled(1)
    runs.refused(home, "other text", "--restart", words=words)
    labeled(0)
    done = runs.server(words)
    assert done.code == 0, done.said


def test_restart_starts_from_the_beginning_with_any_arguments(runs, tmp_path):
    at = runs.moment("drone", "<Journal.write", 0.5)
    assert runs.server(runs.words(tmp_path, "drone", "--keep", 0.5), at).code == KILLED
    done = runs.finish("drone", tmp_path, "--restart")
    assert "is discarded" in done.message
    assert done["solve_site"] == runs.undisturbed("drone")[0]["solve_site"]


def test_what_changes_no_number_may_change(runs, begun, tmp_path_factory):
    other = copy_of(runs.workdir, tmp_path_factory.mktemp("moved") / "workdir")
    other.model.rename(other.folder / "renamed")
    other.text.rename(other.folder / "renamed.txt")
    words = ["compress", other.folder / "renamed", *other.words(begun / "out", *METHODS["drone"])[2:]]
    words += ["--data", other.folder / "renamed.txt", "--cache-memory", 0.00001, "--stream", "auto"]
    done = runs.server(list(map(str, words)))
    assert done.code == 0, done.said
    assert "resumed, " in done.said
    assert done["solve_site"] < runs.undisturbed("drone")[0]["solve_site"]
    found, expected = published(begun / "out"), dict(runs.undisturbed("drone")[1])
    for name in ("eckart/recipe.yaml", "README.md"):  # they name the model, and the recipe how it was worked on
        del found[name], expected[name]
    reports = [found.pop("eckart/report.json"), expected.pop("eckart/report.json")]
    assert reports[0]["quality"] == reports[1]["quality"]
    same(found, expected)
    assert listed(begun) == ["out"]


# -- trouble -----------------------------------------------------------------------------------------


def test_second_run_on_the_same_output_names_the_first(runs, tmp_path):
    words = runs.words(tmp_path, "drone")
    first = runs.server.start(words, runs.moment("drone", "<Journal.write", 0.5), "stop")
    assert runs.server.wait(first).code < 0  # it has stopped, and holds the lock
    try:
        runs.refused(tmp_path, f"Another run (pid {first[0]}", "--output-dir", words=words)
        runs.refused(tmp_path, f"Another run (pid {first[0]}", words=[*words, "--restart"])
    finally:
        os.kill(first[0], 18)  # SIGCONT
    assert runs.server.wait(first).code == 0
    same(published(tmp_path / "out"), runs.undisturbed("drone")[1])


@pytest.mark.parametrize(("name", "left"), [("<load_data", []), (">_verify", ["out.partial"])])
def test_interrupted(name, left, runs, tmp_path):
    done = runs.server(runs.words(tmp_path, "drone"), name, "interrupt")
    assert done.code == 130, done.said
    assert "interrupted" in done.said
    assert "Traceback" not in done.said
    assert listed(tmp_path) == left  # neither lock nor staging
    if left:
        assert runs.finish("drone", tmp_path)["solve_site"] == 0


def test_disk_that_takes_no_more(runs, tmp_path):
    at = runs.moment("drone", ">LayerwiseRunner.run_block", 0.7)
    done = runs.server(runs.words(tmp_path, "drone"), at, "full")
    message = done.message
    assert done.code == 1, message
    for words in ("is full", "bytes, ", "Free some", str(tmp_path / "out.partial"), "run the same command again"):
        assert words in message
    assert "Traceback" not in message
    assert listed(tmp_path) == ["out.partial"]
    runs.finish("drone", tmp_path)


def test_disk_that_is_full_when_publishing(runs, tmp_path):
    done = runs.server(runs.words(tmp_path, "drone"), ">_verify", "full")
    message = done.message
    assert done.code == 1, message
    assert "is full; nothing was published" in message
    assert listed(tmp_path) == ["out.partial"]


def test_room_is_checked_before(runs, tmp_path):
    done = runs.server(runs.words(tmp_path, "drone"), 0, "no workdir")
    assert done.code == 1
    assert "has 1,000 free" in done.said
    assert done["load_data"] == 0
    assert listed(tmp_path) == []


@pytest.mark.parametrize(("what", "words"), [("full", "the space on its disk"), ("denied", "permissions")])
def test_disk_that_takes_nothing_from_the_beginning(what, words, runs, tmp_path):
    done = runs.server(runs.words(tmp_path, "drone"), 0, what)
    message = done.message
    assert done.code == 1
    assert "out.partial" in message
    assert words in message
    assert "out" not in listed(tmp_path)


@pytest.mark.parametrize("what", ["file", "link"])
def test_journal_that_has_no_place(what, runs, tmp_path):
    place = tmp_path / "out.partial"
    if what == "file":
        place.write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    runs.refused(tmp_path, str(place), "--output-dir", words=runs.words(tmp_path, "drone"))
    assert place.is_symlink() == (what == "link")


@pytest.mark.parametrize("more", [(), ("--restart", "--overwrite"), ("--stream", "off")])
def test_folder_of_somebody_else_is_never_removed(more, runs, tmp_path):
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    words = runs.words(tmp_path, "drone", *more)
    if "off" in more:
        assert runs.server(words).code == 0
        assert listed(tmp_path) == ["out", "out.partial"]
    else:
        runs.refused(tmp_path, str(mine), "not made by eckart", "thesis.tex", "Move it away", words=words)
    assert tree(mine) == {"thesis.tex": b"years"}


def test_run_that_works_as_a_whole_leaves_no_unfinished_one_behind(runs, tmp_path):
    home = runs.unfinished("drone", runs.moment("drone", "<Journal.write", 0.5), tmp_path)
    assert "out.partial" in listed(home)
    done = runs.server(runs.words(home, "drone", "--stream", "off"))
    assert done.code == 0, done.said
    assert listed(home) == ["out"]
    assert "an unfinished run of the same output, is removed" in done.message


@pytest.mark.parametrize("more", [("--data", "gone.txt"), ("--keep", 0.001)])
def test_what_is_refused_before_any_work_leaves_no_journal(more, runs, tmp_path):
    done = runs.server(runs.words(tmp_path, "drone", *more))
    assert done.code in (1, 2)
    assert listed(tmp_path) == []
