"""The journal of an unfinished run: whatever kills it, its entries are complete, and the run resumes from them."""

import errno
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from eckart.errors import CheckpointError, NumericalError
from eckart.storage import journal as journals
from eckart.storage import run_key, tensor_file
from eckart.storage.cache import Cache
from eckart.storage.files import write_file
from eckart.storage.journal import Journal, remove_unfinished
from eckart.storage.lock import OutputLock
from eckart.storage.publish import check_output, publish

SOURCE = str(Path(journals.__file__).parents[2])
KEY = {"model": "3f2a" * 16, "recipe": {"keep": 0.5, "targets": ["*"]}, "version": "1"}
NAMES = [f"model.layers.{i}.mlp/up_proj" for i in range(5)]


def refused(*words):
    return pytest.raises(CheckpointError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


def fill(tmp_path, names=NAMES, stage="factors"):
    journal = Journal.open(tmp_path / "out", KEY)
    for i, name in enumerate(names):
        journal.write(stage, name, {"left": torch.full((10, 3), i), "right": torch.ones(i, 4)}, {"loss": i / 3})
    return journal


def again(tmp_path, **options):
    return Journal.open(tmp_path / "out", KEY, **options)


def file_of(journal, index, stage="factors"):
    return sorted((journal.folder / "entries" / stage).iterdir())[index]


def flip(path, place=-5):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_goes_on_where_it_was(tmp_path):
    first = fill(tmp_path)
    assert first.folder == tmp_path / "out.partial"
    first.write("moments", "a", {}, {})
    journal = again(tmp_path)
    assert journal.entries("factors") == NAMES
    assert journal.entries("moments") == ["a"]
    assert journal.entries("refit") == []
    for i, name in enumerate(NAMES):
        tensors, content = journal.read("factors", name)
        assert list(tensors) == ["left", "right"]
        assert torch.equal(tensors["left"], torch.full((10, 3), i))
        assert tensors["right"].shape == (i, 4)
        assert content == {"loss": i / 3}
    journal.write("factors", "last", {"x": torch.ones(1)}, {})
    assert again(tmp_path).entries("factors") == [*NAMES, "last"]
    with pytest.raises(KeyError):
        journal.read("factors", "missing")


def test_order_holds_beyond_ten(tmp_path):
    names = [f"{i}" for i in reversed(range(12))]
    fill(tmp_path, names)
    assert again(tmp_path).entries("factors") == names


def test_numbers_come_back_exactly(tmp_path):
    content = {
        "floats": [0.1, 1e-308, 5e-324, -0.0, 1 / 3, 2**53 + 0.0, 1.7976931348623157e308],
        "others": [2**70, True, None, "ä\n\ud800", {"": []}],
    }
    again(tmp_path).write("a", "x", {"bad": torch.tensor([float("nan"), float("inf")])}, content)
    tensors, got = again(tmp_path).read("a", "x")
    assert repr(got) == repr(content)
    assert torch.isnan(tensors["bad"][0])


def test_content_that_would_not_come_back_is_refused(tmp_path):
    journal = again(tmp_path)
    for value in (float("nan"), float("-inf")):
        with pytest.raises(NumericalError, match=r"content of 'b' \(a\) holds .* not finite.*partial.*Check"):
            journal.write("a", "b", {}, {"scores": [1.0, {"x": value}]})
    for content in ({"a": (1, 2)}, {"a": {1: 2}}, {"a": torch.ones(1)}):
        with pytest.raises(TypeError, match=r"plain JSON|serializable"):
            journal.write("a", "b", {}, content)
    for stage in ("", "..", "a/b", "A", ".a"):
        with pytest.raises(ValueError, match="lower-case"):
            journal.write(stage, "b", {}, {})
    journal.write("a", "b", {}, {})
    with pytest.raises(ValueError, match=r"'b' of stage 'a' is written already"):
        journal.write("a", "b", {}, {})
    assert again(tmp_path).entries("a") == ["b"]


def test_any_name_will_do(tmp_path):
    names = ["a.b", "a/b", "a-b", "../../a", "A.b", "a" * 400, "ä", "", ".", "a\nb", "000001-a", "con"]
    fill(tmp_path, names)
    assert again(tmp_path).entries("factors") == names
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_tensors_are_mapped_and_their_file_stays_as_it_is(tmp_path):
    journal = fill(tmp_path)
    journal.write("big", "b", {"x": torch.zeros(2**20), "odd": torch.ones(3), "y": torch.ones(7)}, {})
    before = tree(journal.folder)
    tensors, _ = journal.read("big", "b")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())
    if sys.platform.startswith("linux"):
        assert str(journal.folder) in Path("/proc/self/maps").read_text()
    tensors["x"].add_(1)
    assert tree(journal.folder) == before


def test_another_key_is_refused_with_every_difference(tmp_path):
    journal = fill(tmp_path)
    before = tree(journal.folder)
    shown = [f"layers.{i}" for i in range(40)]
    other = {
        "model": "3f2a" * 15 + "beef",
        "recipe": {"keep": 0.6, "targets": ["*", *shown], "seed": 1},
        "processes": 2,
    }
    with refused(r"out\.partial", "same arguments", "--restart", "another --output-dir") as caught:
        Journal.open(tmp_path / "out", other)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert len(lines) == 6
    for words in (
        "recipe.keep: 0.5 then, 0.6 now",
        'version: "1" then, absent now',
        "recipe.seed: absent then, 1 now",
        "processes: absent then, 2 now",
    ):
        assert f"  - {words}" in lines
    model = next(line for line in lines if "model" in line)
    assert "3f2a" in model.split("then")[0]
    assert "beef" in model.split("then")[1]
    assert all(len(line) < 180 for line in lines)
    assert tree(journal.folder) == before
    fresh = Journal.open(tmp_path / "out", other, restart=True)
    assert fresh.entries("factors") == []
    assert Journal.open(tmp_path / "out", {**other, "recipe": {**other["recipe"]}}).folder == fresh.folder
    with refused("--restart"):
        again(tmp_path)


def test_tuples_in_the_key_are_lists(tmp_path):
    Journal.open(tmp_path / "out", {"a": (1, 2), "b": {"c": ("d",)}}).write("a", "x", {}, {})
    assert Journal.open(tmp_path / "out", {"b": {"c": ["d"]}, "a": [1, 2]}).entries("a") == ["x"]


def test_restart_throws_away_entries_and_files(tmp_path, caplog):
    journal = fill(tmp_path)
    journal.path("cache", "deep").mkdir(parents=True)
    fresh = again(tmp_path, restart=True)
    assert fresh.entries("factors") == []
    assert set(tree(fresh.folder)) == {"journal.json"}
    assert not fresh.path("cache").exists()
    assert "discarded" in caplog.text


def flip_number(path):
    flip(path)


def flip_header(path):
    flip(path, path.read_bytes().index(b"loss"))


def flip_checksum(path):
    flip(path, tensor_file.BEGIN)


def lose(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def swap(path):
    """With the entry after it."""
    other = sorted(path.parent.iterdir())[sorted(path.parent.iterdir()).index(path) + 1]
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "index", "words"),
    [
        (flip_number, 0, "its checksum differs"), (flip_number, 2, "its checksum differs"),
        (flip_number, 4, "its checksum differs"), (flip_header, 2, "checksum differs"),
        (flip_checksum, 2, "checksum differs"), (cut, 2, "truncated"), (swap, 2, "entry 3 of factors, under another"),
        (lose, 2, "the entry before it, 2, is missing"),
    ],
)  # fmt: skip
def test_damaged_entry_is_removed_with_all_after_it(harm, index, words, tmp_path, caplog):
    journal = fill(tmp_path)
    journal.write("moments", "a", {}, {})
    path = file_of(journal, index)
    harm(path)
    journal = again(tmp_path)
    assert journal.entries("factors") == NAMES[:index]
    assert journal.entries("moments") == ["a"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert words in message
    if harm is not lose:
        assert path.name in message
        assert f"the {4 - index} entries of factors after it are removed" in message
    assert (repr(NAMES[index - 1]) if index else "beginning") in message
    assert len(list((journal.folder / "entries" / "factors").iterdir())) == index
    for name in NAMES[index:]:
        journal.write("factors", name, {"new": torch.ones(1)}, {})
    caplog.clear()
    journal = again(tmp_path)
    assert journal.entries("factors") == NAMES
    assert "new" in journal.read("factors", NAMES[4])[0]
    assert not caplog.records


def test_every_bit_of_an_entry_counts(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor_file.write_tensors(path, {"x": torch.ones(3), "n": torch.arange(2)}, {"entry": json.dumps({"loss": 1e5})})
    assert tensor_file.find_damage(path) is None
    for place in range(path.stat().st_size):
        flip(path, place)
        assert tensor_file.find_damage(path) is not None, place
        flip(path, place)
    assert tensor_file.find_damage(path) is None


def test_damage_beyond_the_first_piece_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor_file.write_tensors(path, {"x": torch.zeros(3 * tensor_file.PIECE // 4 + 1)})
    assert tensor_file.find_damage(path) is None
    flip(path, 2 * tensor_file.PIECE + 5)
    assert "checksum" in tensor_file.find_damage(path)


def test_leftovers_of_a_killed_writer_are_removed_without_a_warning(tmp_path, caplog):
    journal = fill(tmp_path)
    before = tree(journal.folder)
    (journal.folder / "entries" / "factors" / "000005-x.safetensors.tmp").write_bytes(b"half")
    (journal.folder / "journal.json.tmp").write_bytes(b"{")
    assert again(tmp_path).entries("factors") == NAMES
    assert tree(journal.folder) == before
    assert not caplog.records


def test_entry_that_may_not_be_read_is_kept(tmp_path, monkeypatch):
    journal = fill(tmp_path)
    before = tree(journal.folder)

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(journals, "find_damage", denied)
    with refused("000000-.*Permission denied", "Check its permissions"):
        again(tmp_path)
    assert tree(journal.folder) == before


def superseding(tmp_path, count=5):
    journal = Journal.open(tmp_path / "out", KEY)
    for i in range(count):
        journal.write("state", f"step {i}", {"x": torch.full((3,), float(i))}, {"step": i}, supersedes=True)
    return journal


def test_entries_that_supersede_others_take_their_place(tmp_path):
    journal = superseding(tmp_path)
    assert journal.entries("state") == ["step 3", "step 4"]
    assert len(list((journal.folder / "entries" / "state").iterdir())) == 2
    found = again(tmp_path)
    assert found.entries("state") == ["step 3", "step 4"]
    assert found.read("state", "step 4")[0]["x"].tolist() == [4.0, 4.0, 4.0]
    found.write("state", "step 5", {}, {}, supersedes=True)
    assert again(tmp_path).entries("state") == ["step 4", "step 5"]


@pytest.mark.parametrize(("damaged", "left"), [(0, ["step 4"]), (1, ["step 3"])])
def test_a_damaged_entry_does_not_harm_one_that_supersedes_it(damaged, left, tmp_path, caplog):
    journal = superseding(tmp_path)
    path = file_of(journal, damaged, "state")
    flip(path)
    found = again(tmp_path)
    assert found.entries("state") == left
    assert len(caplog.records) == 1
    assert path.stem in caplog.text
    assert len(list((journal.folder / "entries" / "state").iterdir())) == 1
    found.write("state", "step 9", {}, {}, supersedes=True)
    assert again(tmp_path).entries("state") == [*left, "step 9"]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"format": "eckart jour', {"version": 2}, {"version": "2", "key": KEY}, {"version": 1}]
)
def test_run_with_a_damaged_or_older_key_starts_from_the_beginning(content, tmp_path, caplog):
    journal = fill(tmp_path)
    journal.path("cache").mkdir(parents=True)
    if isinstance(content, dict):
        content = json.dumps({"format": "eckart journal", **content}).encode()
    (journal.folder / "journal.json").write_bytes(content)
    assert again(tmp_path).entries("factors") == []
    assert set(tree(journal.folder)) == {"journal.json"}
    assert re.search(r"journal.json is (damaged|of an older eckart): the run starts from the beginning", caplog.text)


def test_newer_version_is_refused(tmp_path):
    journal = fill(tmp_path)
    (journal.folder / "journal.json").write_text(json.dumps({"format": "eckart journal", "version": 7}))
    with refused("journal.json has format version 7", "up to 2", "newer eckart", "--restart", "--output-dir"):
        again(tmp_path)
    assert len(tree(journal.folder)) == 6
    assert again(tmp_path, restart=True).entries("factors") == []


def nothing_of_ours(folder):
    (folder / "thesis.tex").write_text("years of work")


def record_of_another(folder):
    (folder / "journal.json").write_text('{"title": "Journal of Vibration"}')


def empty_record_of_another(folder):
    (folder / "journal.json").write_text("{}")


def garbled_record_of_another(folder):
    (folder / "journal.json").write_text("Dear diary")
    (folder / "thesis.tex").write_text("years of work")


def entries_alone(folder):
    (folder / "entries").mkdir()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    "made", [nothing_of_ours, record_of_another, empty_record_of_another, garbled_record_of_another, entries_alone]
)
def test_folder_of_somebody_else_is_left_alone(made, restart, tmp_path):
    (tmp_path / "out.partial").mkdir()
    made(tmp_path / "out.partial")
    before = tree(tmp_path)
    with refused(r"out\.partial", "not made by eckart", "found: ", "Move it away", "--output-dir"):
        again(tmp_path, restart=restart)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("part", ["entries", "files", "entries/solved", "files/waiting"])
def test_links_inside_a_journal_are_not_followed(part, tmp_path):
    """What is damaged or left over is removed: through a link, of another folder."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/000000-precious.safetensors").write_bytes(b"precious")
    place = Journal.open(tmp_path / "out", {"seed": 0}).folder / part
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{part} is a symbolic link"):
        Journal.open(tmp_path / "out", {"seed": 0})
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["000000-precious.safetensors"]


def test_file_beside_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "victim")
    write_file(tmp_path / "file", [b"new"])
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "file").read_bytes() == b"new"


def test_unfinished_run_goes_when_another_run_has_published(tmp_path, caplog):
    journal = Journal.open(tmp_path / "out", {"seed": 0})
    journal.write("solved", "a", {"x": torch.ones(2)}, {})
    remove_unfinished(tmp_path / "out")
    assert not journal.folder.exists()
    assert "an unfinished run of the same output, is removed" in caplog.text
    remove_unfinished(tmp_path / "out")  # nothing there
    journal.folder.mkdir()
    (journal.folder / "novel.txt").write_text("of somebody else")
    remove_unfinished(tmp_path / "out")
    assert (journal.folder / "novel.txt").exists()
    Journal.open(tmp_path / "other", {"seed": 0})
    (tmp_path / "other.partial" / "novel.txt").write_text("of somebody else")
    remove_unfinished(tmp_path / "other")
    assert (tmp_path / "other.partial" / "novel.txt").exists()


def test_places_that_cannot_be_used(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with refused(r"out\.partial is a symbolic link", "Remove it", "--output-dir"):
        again(tmp_path)
    (tmp_path / "file").touch()
    with refused("file", "permissions", "--output-dir"):
        Journal.open(tmp_path / "file" / "out", KEY)
    (tmp_path / "other.partial").touch()
    with refused(r"other\.partial", "File exists", "--output-dir"):
        Journal.open(tmp_path / "other", KEY)
    (tmp_path / "third.partial").mkdir()
    assert Journal.open(tmp_path / "deep" / "er" / ".." / "out", KEY).folder == tmp_path / "deep" / "out.partial"
    assert Journal.open(tmp_path / "third", KEY).entries("a") == []


def test_remove_leaves_nothing(tmp_path, caplog, monkeypatch):
    journal = fill(tmp_path)
    journal.path("cache").mkdir(parents=True)
    (journal.path("cache") / "x").touch()
    journal.remove()
    assert list(tmp_path.iterdir()) == []
    assert journal.entries("factors") == []
    journal = fill(tmp_path)

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(run_key.shutil, "rmtree", denied)
    journal.remove()
    assert "out.partial, no longer needed, cannot be removed" in caplog.text
    monkeypatch.undo()
    caplog.clear()
    assert again(tmp_path).entries("factors") == []  # it was being thrown away
    assert not caplog.records


def test_full_disk_while_removing(tmp_path, monkeypatch):
    journal = fill(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_key, "write_file", full)
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_places_for_other_files(tmp_path):
    journal = fill(tmp_path)
    assert journal.path("cache", "out").is_relative_to(journal.folder)
    with Cache(0, journal.path("cache"), durable=True) as cache:
        cache.put("out/0", {"x": torch.ones(2)})
    journal = again(tmp_path)
    assert journal.entries("factors") == NAMES
    assert Cache(0, journal.path("cache"), durable=True).has("out/0")
    for parts in (("..",), ("/etc",), ("a", "../..")):
        with pytest.raises(ValueError, match="leaves the folder"):
            journal.path(*parts)


def test_room_is_checked_before(tmp_path):
    journal = fill(tmp_path)
    journal.check_space(1000, "The factors")
    with refused(f"The factors needs {2**60:,} bytes in", r"out\.partial", r"[\d,]+ free\.", "--output-dir"):
        journal.check_space(2**60, "The factors")


@pytest.mark.parametrize(
    ("step", "error"),
    [("tensors", OSError(errno.ENOSPC, "No space")), ("folder", OSError(errno.EIO, "Bad disk")),
     ("tensors", KeyboardInterrupt()), ("folder", KeyboardInterrupt())],
)  # fmt: skip
def test_write_that_fails_leaves_the_entries_before(step, error, tmp_path, monkeypatch, caplog):
    journal = fill(tmp_path)
    before = tree(journal.folder)

    def fails(*_, **__):
        if step == "tensors":
            yield b"half"
        raise error

    def raises(*_, **__):
        raise error

    if step == "tensors":
        monkeypatch.setattr(tensor_file, "_pieces", fails)
    else:
        monkeypatch.setattr(journals, "sync_folder", raises)
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
        journal.write("factors", "new", {"x": torch.ones(100)}, {})
    monkeypatch.undo()
    if isinstance(error, OSError):
        words = ["full", "400 bytes", "are free"] if error.errno == errno.ENOSPC else ["Bad disk", "permissions"]
        for word in (*words, "out.partial", "'new' (factors)", "same command again", "resumes from what is done"):
            assert word in str(caught.value)
    assert tree(journal.folder) == before
    journal.write("factors", "new", {"x": torch.ones(100)}, {})  # the same process may try again
    assert again(tmp_path).entries("factors") == [*NAMES, "new"]
    assert not caplog.records


def test_entry_damaged_during_the_run_is_named(tmp_path):
    journal = fill(tmp_path)
    cut(file_of(journal, 1))
    flip(file_of(journal, 2), 10)  # the header
    for index in (1, 2):
        with refused(f"00000{index}-.*", "damaged during the run", "same command again"):
            journal.read("factors", NAMES[index])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_lock_and_publish_leave_the_journal_alone(error, tmp_path):
    journal = fill(tmp_path)
    before = tree(journal.folder)
    with pytest.raises(error), OutputLock(tmp_path / "out") as lock, publish(tmp_path / "out", lock=lock) as staging:  # noqa: PT012
        (staging / "config.json").touch()
        raise error
    assert tree(journal.folder) == before
    # A run killed while it published, and a record that names the journal itself.
    (tmp_path / "out.partial-0123abcd").mkdir()
    for left in ({"staging": "out.partial-0123abcd"}, {"staging": "out.partial", "aside": "out.partial"}):
        (tmp_path / ".out.lock").write_text(json.dumps(left))
        with OutputLock(tmp_path / "out"):
            assert tree(journal.folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert again(tmp_path).entries("factors") == NAMES
    with refused("out.partial", "--overwrite"):
        check_output(tmp_path / "out.partial", overwrite=True)


KILLED = """
import os, random, signal, sys, time
import torch
from eckart.storage.journal import Journal

torch.set_num_threads(1)
out, chance = sys.argv[1], random.Random(5)

def tensors(i):
    size = (i * 7919) % 60_000
    return {"a": torch.arange(size) + i, "b": torch.full((size % 500,), i / 3, dtype=torch.float64)}

def open_again(**options):
    return Journal.open(out, {"model": "x"}, **options)

for trial in range(10):
    restart = trial >= 5
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            journal = open_again(restart=restart)
            for i in range(len(journal.entries("s")), 40 if restart else 10**9):
                journal.write("s", f"block.{i}/x", tensors(i), {"i": i, "third": i / 3})
                os.write(tell, b".")
            if chance.random() < 0.5:
                journal.remove()
    for _ in range(chance.randrange(20)):
        os.read(told, 1)
    time.sleep(chance.uniform(0, 0.01))  # somewhere in the next write
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    journal = open_again()
    names = journal.entries("s")
    assert names == [f"block.{i}/x" for i in range(len(names))]
    for i, name in enumerate(names):
        got, content = journal.read("s", name)
        assert content == {"i": i, "third": i / 3}
        expected = tensors(i)
        assert list(got) == list(expected)
        assert all(torch.equal(got[key], value) for key, value in expected.items())
    print(len(names))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment_it_goes_on(server, tmp_path):
    said = server.run_code(KILLED, tmp_path / "out")
    assert "dropped" not in said  # an entry is there or not; none is found half-written
    counts = [int(line) for line in said.splitlines() if line.isdecimal()]
    assert len(counts) == 10
    continued, restarted = counts[:5], counts[5:]
    assert max(continued) > 10
    assert continued == sorted(continued)
    assert restarted != sorted(restarted)
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial"}
