"""Publishing: a whole folder or nothing, whatever goes wrong in between."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from eckart.errors import CheckpointError, UsageError
from eckart.storage import publish as publishing
from eckart.storage.lock import OutputLock
from eckart.storage.manifest import write_manifest
from eckart.storage.publish import PROBE, check_output, probe_folder, publish


class BodyError(Exception):
    """Raised by a body that fails."""


def fill(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "weights").write_text(text)


def old_output(folder: Path) -> None:
    """What eckart has published before."""
    fill(folder, "old")
    write_manifest(folder)


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refused(*words: str):
    return pytest.raises(CheckpointError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Replace in one step where the system can, and as everywhere else."""
    if request.param == "two renames":
        monkeypatch.setattr(publishing, "exchange", lambda one, other: False)


def test_published_whole_and_nothing_beside_it(tmp_path):
    with publish(tmp_path / "deep" / "out") as staging:
        assert staging.parent == tmp_path / "deep"
        assert not (tmp_path / "deep" / "out").exists()
        fill(staging, "new")
    assert contents(tmp_path / "deep") == {"out"}
    assert (tmp_path / "deep" / "out" / "sub" / "weights").read_text() == "new"


def test_files_are_as_readable_as_the_folder(tmp_path):
    with publish(tmp_path / "out") as staging:
        fill(staging, "new")
        (staging / "config.json").chmod(0o600)
    mode = (tmp_path / "out").stat().st_mode & 0o666
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("error", [BodyError, KeyboardInterrupt, SystemExit])
def test_body_that_raises_publishes_nothing(error, tmp_path):
    old_output(tmp_path / "out")
    with pytest.raises(error), publish(tmp_path / "out", overwrite=True) as staging:  # noqa: PT012
        fill(staging, "new")
        raise error
    assert contents(tmp_path) == {"out"}
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_existing_output_is_refused(tmp_path):
    old_output(tmp_path / "out")
    with refused("out", "--overwrite", "--output-dir"), publish(tmp_path / "out"):
        pytest.fail("the body ran")
    assert contents(tmp_path) == {"out"}


def test_overwrite_replaces_the_whole_folder(way, tmp_path):
    old_output(tmp_path / "out")
    with publish(tmp_path / "out", overwrite=True) as staging:
        (staging / "model").write_text("new")
        assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert contents(tmp_path) == {"out"}
    assert contents(tmp_path / "out") == {"model", "eckart"}
    with publish(tmp_path / "out", overwrite=True) as staging:  # what was published can be replaced again
        fill(staging, "newer")
    (tmp_path / "empty").mkdir()
    with publish(tmp_path / "empty", overwrite=True) as staging:
        fill(staging, "new")


def test_overwrite_replaces_only_what_eckart_published(tmp_path):
    out = tmp_path / "out"

    def is_kept(*words):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with refused(*words, "--overwrite deletes only what eckart has published", "--output-dir"):
            check_output(out, overwrite=True)
        with refused(*words), publish(out, overwrite=True):
            pytest.fail("the body ran")
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        shutil.rmtree(out)

    fill(out, "a model of somebody else's")
    is_kept("was not published by eckart: config.json, sub/weights lie there")
    for name in ("thesis.tex", "sub/.git/HEAD", "eckart/notes.txt"):
        old_output(out)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
        is_kept(f"{name} was not written by eckart")
    old_output(out)
    (out / "texts").symlink_to(tmp_path)
    is_kept("texts was not written by eckart")
    for changed in ("edited", "odl"):  # of another size, and of the same
        old_output(out)
        (out / "sub/weights").write_text(changed)
        is_kept("sub/weights was changed after eckart wrote it")
    for content in ("{}", "[]", "not JSON", json.dumps({"format": "another", "files": {"config.json": [1, 2]}})):
        old_output(out)
        (out / "eckart/files.json").write_text(content)
        is_kept("was not published by eckart")


def test_overwrite_sees_changes_at_both_ends_of_a_large_file(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    content = bytearray(300_000)
    (out / "weights").write_bytes(content)
    write_manifest(out)
    assert check_output(out, overwrite=True) == out
    for place in (0, -1):
        changed = content.copy()
        changed[place] = 1
        (out / "weights").write_bytes(changed)
        with refused("weights was changed"):
            check_output(out, overwrite=True)
    (out / "weights").unlink()  # what is gone cannot be lost
    assert check_output(out, overwrite=True) == out


def test_output_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with refused("not a folder", "--output-dir"):
        check_output(tmp_path / "file", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path)
    with refused("symbolic link", str(tmp_path)):
        check_output(tmp_path / "link", overwrite=True)


def test_output_never_is_holds_or_lies_inside_an_input(tmp_path, monkeypatch):
    home = tmp_path / "home"
    old_output(home / "input")
    (home / "texts").mkdir()
    (home / "texts/a.txt").write_text("text")
    (tmp_path / "link").symlink_to(home)
    given = [None, "org/name-on-the-hub", "x" * 5000, "a\0b", object(), home / "input", str(home / "texts/a.txt")]
    for output, words in {
        home / "input": "is an input",
        tmp_path / "link/input": "is an input",
        home / "input/out": "lies inside .*input",
        home: "holds .*input",
        home / "texts": "holds .*a.txt",
        home / "texts/a.txt": "is an input",
    }.items():
        with refused(f"The output .* {words}", "never replaced", "--output-dir"):
            check_output(output, overwrite=True, inputs=given)
    with refused("is an input"):
        check_output(home / "input", overwrite=True, inputs=[tmp_path / "link/input"])
    assert check_output(home / "input-2", inputs=given)
    assert check_output(home / "texts/out", inputs=given)  # beside the file that is read
    monkeypatch.chdir(home / "input")
    with refused("is an input"):
        check_output(home / "texts", overwrite=True, inputs=["../texts"])
    with refused("is the current folder", "--output-dir"):
        check_output(".", overwrite=True)
    with refused("holds the current folder", "--output-dir"):
        check_output("..", overwrite=True)
    assert check_output("out") == home / "input/out"
    assert check_output("out", inputs=[""]) == home / "input/out"  # the name of a model that was built, not loaded


def test_output_without_space_or_permission_is_refused(tmp_path, monkeypatch):
    with refused("bytes", "--output-dir"):
        check_output(tmp_path / "out", needed_bytes=2**62)
    (tmp_path / "file").touch()
    with refused(str(tmp_path / "file"), "cannot be written to", "--output-dir"):
        check_output(tmp_path / "file" / "out")

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with refused(str(tmp_path), "Permission denied", "--output-dir"):
        check_output(tmp_path / "out")


@pytest.mark.parametrize("nameless", [True, False], ids=["a file without a name", "a file with one"])
def test_trying_whether_a_folder_can_be_written_leaves_nothing_for_ever(nameless, tmp_path, monkeypatch):
    """A process that is killed at any moment leaves nothing, or one file that the next run removes."""
    own, opened = os.open, []

    def opening(path, flags, *more, **named):
        if not nameless and flags & getattr(os, "O_TMPFILE", 0) == getattr(os, "O_TMPFILE", -1):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        opened.append(own(path, flags, *more, **named))
        if len(opened) == 1 and not nameless:
            raise KeyboardInterrupt  # in place of a kill: nothing after this runs
        return opened[-1]

    monkeypatch.setattr(os, "open", opening)
    if nameless:
        probe_folder(tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            probe_folder(tmp_path)
        assert contents(tmp_path) == {PROBE}
        probe_folder(tmp_path)
        os.close(opened[0])
    assert contents(tmp_path) == set()
    (tmp_path / PROBE).symlink_to(tmp_path / "victim")
    if not nameless:
        with pytest.raises(OSError, match="symbolic"):
            probe_folder(tmp_path)
    assert not (tmp_path / "victim").exists()


def test_names_that_cannot_be_are_refused_before_any_work(tmp_path):
    with refused("is a name of 240 bytes", "Choose a shorter --output-dir"):
        check_output(tmp_path / ("x" * 240))
    with refused("is a name of 240 bytes"):
        check_output(tmp_path / ("x" * 240) / "out")
    with refused("is a name of 2[0-9][0-9] bytes"):
        check_output(tmp_path / ("é" * 120))
    with refused("cannot be a path", "File name too long", "--output-dir"):
        check_output(tmp_path / "/".join(["x" * 200] * 40))
    with pytest.raises(UsageError, match="cannot be a path"):
        check_output(f"{tmp_path}/a\0b")
    check_output(tmp_path / ("x" * 200))


def test_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with refused("where a disk is mounted", "--output-dir .*disk/model"):
        check_output(tmp_path / "disk", overwrite=True)
    assert check_output(tmp_path / "disk" / "model")


FAILED_WRITES = {
    "full": OSError(errno.ENOSPC, "No space"),
    "full, says Rust": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "full, says tokenizers": Exception("No space left on device (os error 28)"),
    "over the quota": OSError(errno.EDQUOT, "Quota"),
    "over the quota, says Rust": SafetensorError("I/O error: Disk quota exceeded (os error 122)"),
}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EFBIG, "File too large"), OSError(errno.EIO, "Input/output error"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        Exception("Input/output error (os error 5)"),
    ],
)  # fmt: skip
def test_file_that_cannot_be_written_is_told_as_that(error, tmp_path):
    with refused(str(tmp_path / "out"), "(File too large|Input/output error)", "nothing was published", "ulimit"):  # noqa: SIM117
        with publish(tmp_path / "out") as staging:
            fill(staging, "new")
            raise error
    assert contents(tmp_path) == set()


@pytest.mark.parametrize("error", FAILED_WRITES.values(), ids=FAILED_WRITES)
def test_full_disk_clears_the_staging_folder(error, tmp_path):
    with refused("full", "nothing was published", "--output-dir"), publish(tmp_path / "out") as staging:
        fill(staging, "new")
        raise error
    assert contents(tmp_path) == set()


def test_rename_that_fails_gives_the_old_output_back(tmp_path, monkeypatch):
    old_output(tmp_path / "out")
    monkeypatch.setattr(publishing, "exchange", lambda one, other: False)
    rename = Path.rename

    def fails(self, target):
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with refused("out", "Input/output error", "nothing was published", "--output-dir"):  # noqa: SIM117
        with publish(tmp_path / "out", overwrite=True) as staging:
            fill(staging, "new")
    assert contents(tmp_path) == {"out"}
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_output_that_appears_meanwhile_is_left_alone(tmp_path):
    with refused("out", "--overwrite"), publish(tmp_path / "out") as staging:
        fill(staging, "new")
        fill(tmp_path / "out", "somebody else's")
    assert contents(tmp_path) == {"out"}
    assert (tmp_path / "out" / "config.json").read_text() == "somebody else's"


def test_lock_of_the_whole_run_is_shared_with_publish(tmp_path):
    with OutputLock(tmp_path / "out") as lock:
        assert lock.held
        with refused(f"pid {os.getpid()}", "--output-dir"), OutputLock(tmp_path / "out"):
            pytest.fail("two runs on one output")
        with refused(f"pid {os.getpid()}"), publish(tmp_path / "out"):
            pytest.fail("two runs on one output")
        with publish(tmp_path / "out", lock=lock) as staging:
            fill(staging, "new")
        assert lock.held
    assert not lock.held
    assert contents(tmp_path) == {"out"}


CHILD = """
import sys, time
from eckart.storage.publish import publish
with publish(sys.argv[1], overwrite=True) as staging:
    (staging / "config.json").write_text("half")
    print(staging, flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused_and_a_killed_one_does_not_block(tmp_path):
    source = str(Path(publishing.__file__).parents[2])
    old_output(tmp_path / "out")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        left = Path(child.stdout.readline().strip())
        with refused(f"pid {child.pid}", "out", "--output-dir"), publish(tmp_path / "out", overwrite=True):
            pytest.fail("two runs on one output")
    finally:
        child.kill()
        child.communicate()
    assert left.is_dir()
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    with publish(tmp_path / "out", overwrite=True) as staging:
        assert not left.exists()
        fill(staging, "new")
    assert contents(tmp_path) == {"out"}
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_killed_between_two_renames_the_old_output_is_put_back(tmp_path):
    fill(tmp_path / "out.old-0123abcd", "old")
    fill(tmp_path / "out.partial-0123abcd", "new")
    record = {"pid": 2**30, "aside": "out.old-0123abcd", "staging": "out.partial-0123abcd"}
    (tmp_path / ".out.lock").write_text(json.dumps(record))
    with OutputLock(tmp_path / "out"):
        assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert contents(tmp_path) == {"out"}


@pytest.mark.parametrize("name", ["precious", "../precious", "out.partial-0123abcd/../precious", 3, None])
def test_forged_lock_removes_nothing_else(name, tmp_path):
    fill(tmp_path / "precious", "mine")
    (tmp_path / ".out.lock").write_text(json.dumps({"staging": name, "aside": name}))
    with OutputLock(tmp_path / "out"):
        pass
    assert contents(tmp_path) == {"precious"}


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"[1]", b'{"pid": '])
def test_garbled_lock_does_not_block(content, tmp_path):
    (tmp_path / ".out.lock").write_bytes(content)
    with publish(tmp_path / "out") as staging:
        fill(staging, "new")
    assert contents(tmp_path) == {"out"}


def test_file_system_without_locks(tmp_path, monkeypatch, caplog):
    from eckart.storage import lock

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with publish(tmp_path / "out") as staging:
        fill(staging, "new")
    assert "do not start a second run" in caplog.text
    monkeypatch.setattr(lock, "fcntl", None)
    with publish(tmp_path / "out", overwrite=True) as staging:
        fill(staging, "newer")
    assert contents(tmp_path) == {"out"}


def test_old_output_that_cannot_be_removed_is_named(way, tmp_path, monkeypatch, caplog):
    old_output(tmp_path / "out")
    with publish(tmp_path / "out", overwrite=True) as staging:
        fill(staging, "new")
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert "cannot be removed" in caplog.text


def test_lock_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with refused("file", "cannot be written", "--output-dir"), OutputLock(tmp_path / "file" / "out"):
        pytest.fail("locked")


def test_lock_is_not_opened_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "victim")
    with refused("cannot be written", "--output-dir"), OutputLock(tmp_path / "out"):
        pytest.fail("locked")
    assert (tmp_path / "victim").read_text() == "precious"
