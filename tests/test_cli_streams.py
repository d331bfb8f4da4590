"""What the command line prints, where its streams are closed, full, read by nobody, or a terminal that obeys."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.table import Table
from tiny import llama, place

from eckart.cli.app import app
from eckart.cli.console import say, show
from eckart.cli.start import hold_standard_streams
from eckart.cli.terminal import Verbatim, encode_anything, make_visible
from eckart.errors import EckartError
from eckart.storage.publish import PUBLISHED


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return place(llama(num_hidden_layers=1), tmp_path_factory.mktemp("model") / "llama")


def run(*words) -> int:
    with pytest.raises(SystemExit) as left:
        app([str(word) for word in words])
    return int(left.value.code or 0)


def full() -> io.TextIOBase:
    return open("/dev/full", "w", encoding="utf-8")


def unread() -> io.TextIOBase:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


STREAMS = {"full": full, "closed": lambda: None, "unread": unread}


@pytest.mark.parametrize("name", STREAMS)
def test_a_published_folder_is_told_as_published_whatever_becomes_of_stdout(name, model, tmp_path, monkeypatch, capsys):
    stream = STREAMS[name]()
    monkeypatch.setattr(sys, "stdout", stream)
    code = run("compress", model, "--method", "svd", "--keep", "0.6", "--output-dir", tmp_path / "out")
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert code == 0, said
    assert (tmp_path / "out/model.safetensors").is_file()
    assert "nothing was published" not in said
    assert ("is published, and whole" in " ".join(said.split())) == (name != "unread")
    if stream is not None:
        stream.close()  # what it held back leads nowhere: nothing fails when the process ends


@pytest.mark.parametrize(("name", "expected"), [("full", 1), ("closed", 1), ("unread", 0)])
def test_results_that_are_the_whole_purpose_fail_where_they_cannot_be_printed(name, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", STREAMS[name]())
    code = run("methods")
    monkeypatch.undo()
    assert code == expected
    assert ("the results cannot be printed" in capsys.readouterr().err) == bool(expected)


@pytest.mark.parametrize("name", STREAMS)
def test_work_goes_on_where_progress_cannot_be_printed(name, monkeypatch):
    monkeypatch.setattr(sys, "stderr", STREAMS[name]())
    say("a line of progress")
    say("another one")


def test_a_fault_after_publication_says_that_the_folder_is_there(model, tmp_path, monkeypatch, capsys):
    def published_then(error):
        def run(*_, **__):
            PUBLISHED.append(tmp_path / "out")
            raise error

        return run

    for error in (EckartError("late"), OSError(5, "Input/output error"), KeyError("late"), KeyboardInterrupt()):
        monkeypatch.setattr("eckart.compression.pipeline.compress", published_then(error))
        code = run("compress", model, "--output-dir", tmp_path / "out")
        said = " ".join(capsys.readouterr().err.split())
        assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
        assert "out was published before that, and is whole" in said
        assert "nothing was published" not in said


@pytest.mark.parametrize(
    "error",
    [
        KeyError("nonesuch"), IndexError("index 0"), AssertionError("no"), OverflowError("too large"),
        ZeroDivisionError("by zero"), RecursionError("too deep"), NotImplementedError("not here"),
        type("SafetensorError", (Exception,), {})("Error while serializing: I/O error: File too large (os error 27)"),
        Exception("a bare one"), UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_error_that_nobody_foresaw_is_one_line_with_the_step_it_stopped(error, model, tmp_path, monkeypatch, capsys):
    def resolve_nothing(*_, **__):
        raise error

    monkeypatch.setattr("eckart.checkpoint.open.resolve", resolve_nothing)
    assert run("compress", model, "--method", "svd", "--output-dir", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    line = " ".join(said.split())
    assert type(error).__name__ in line
    assert "while find checkpoint (open.py)" in line
    assert "nothing was published" in line
    assert os.listdir(tmp_path) == []


# -- what a terminal would obey ----------------------------------------------------------------------


def test_control_characters_of_a_checkpoint_are_shown_and_not_obeyed(capsys):
    hostile = "name\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp.exe\ud800\r"
    table = Table("site")
    table.add_row(hostile)
    show(hostile, table)
    say(hostile, "red")
    found = capsys.readouterr()
    for text in (found.out, found.err):
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\ud800", "\r"} & set(text)
        assert r"\x1b[2J" in text
        assert r"\u202e" in text
        assert r"\ud800" in text
    assert make_visible("été\t日本\n") == "été\t日本\n"


def test_words_that_the_terminal_cannot_encode_are_printed_all_the_same(monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    encode_anything()
    show("naïve \u2026")
    monkeypatch.undo()
    assert raw.getvalue() == b"na\\xefve \\u2026\n"


# -- signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_in_the_first_seconds_is_no_traceback(number, code, model, tmp_path):
    words = [sys.executable, "-m", "eckart", "compress", str(model), "--method", "svd", "--output-dir", str(tmp_path)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    end = time.monotonic() + 60
    while "libtorch" not in maps.read_text() and time.monotonic() < end:  # torch is being imported
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert "nothing was published" in said


def test_library_that_swallows_an_interrupt_while_it_is_imported_does_not_go_on(tmp_path):
    (tmp_path / "swallows.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    code = f"""
import signal, sys
from eckart.cli import start
signal.signal(signal.SIGINT, start._stop)
sys.path.insert(0, {str(tmp_path)!r})
import swallows
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; nothing was published.\n"


def test_kill_cleans_up_as_an_interrupt_does(model, tmp_path, monkeypatch, capsys):
    from eckart.cli.start import Terminated

    def stop(*_, **__):
        raise Terminated

    monkeypatch.setattr("eckart.checkpoint.save._verify", stop)
    assert run("compress", model, "--method", "svd", "--keep", "0.6", "--output-dir", tmp_path / "out") == 143
    assert os.listdir(tmp_path) == []


def test_no_file_is_opened_in_place_of_a_closed_standard_stream(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent.parent / "src")!r})
from eckart.cli.start import hold_standard_streams
hold_standard_streams()
file = open({str(tmp_path / "weights")!r}, "w")
assert file.fileno() > 2, file.fileno()
"""
    done = subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "$0" >&- <&-', code], capture_output=True)
    assert done.returncode == 0, done.stderr
    hold_standard_streams()  # where they are open nothing changes


def test_what_is_copied_is_never_wrapped_and_sentences_are(capsys):
    line = "model = AutoModelForCausalLM.from_pretrained('/a/long/path/" + "of-many-folders/" * 8 + "') # more words"
    show(Verbatim(line), line)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == line
    assert len(rest) > 1
