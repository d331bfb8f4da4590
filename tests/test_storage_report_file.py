"""A report replaces earlier reports, and nothing else."""

import json
import os

import pytest

from eckart.errors import UsageError
from eckart.storage.report_file import check_report_file, write_report

CONTENT = {"perplexity": float("inf"), "rows": [{"loss": float("nan")}, (1.5, "a")]}
STORED = {"written_by": "eckart", "perplexity": "inf", "rows": [{"loss": "nan"}, [1.5, "a"]]}


def refused(*words: str):
    return pytest.raises(UsageError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


def test_report_is_written_and_replaces_a_report(tmp_path):
    path = tmp_path / "report.json"
    (tmp_path / "empty.json").touch()
    (tmp_path / "link.json").symlink_to(path)
    for name in ("report.json", "report.json", "empty.json", "link.json"):
        check_report_file(tmp_path / name)
        write_report(tmp_path / name, CONTENT)
        assert json.loads((tmp_path / name).read_text()) == STORED
    assert (tmp_path / "link.json").is_symlink()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "[]", "text", '{"written_by": "somebody"}'])
def test_report_replaces_no_other_file(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    (tmp_path / "link.json").symlink_to(path)
    for name in ("config.json", "link.json"):
        with refused(name, "not a report of eckart", "another file"):
            check_report_file(tmp_path / name)
        with refused(name):
            write_report(tmp_path / name, CONTENT)
    assert path.read_text() == content


def test_report_is_never_an_input_nor_inside_one(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.json").write_text(json.dumps(STORED))  # an earlier report that is read as data
    inputs = [None, "org/name", tmp_path / "model", str(tmp_path / "rows.json")]
    with refused("lies inside .*model", "another file"):
        check_report_file(tmp_path / "model/report.json", inputs)
    with refused("rows.json is .*rows.json", "another file"):
        write_report(tmp_path / "rows.json", CONTENT, inputs)
    write_report(tmp_path / "report.json", CONTENT, inputs)


def test_report_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    with refused("no folder", "gone", "another"):
        check_report_file(tmp_path / "gone/report.json")
    with refused("is not a report"):
        check_report_file(tmp_path)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", denied)
    with refused("Permission denied", "another file"):
        check_report_file(tmp_path / "report.json")
    monkeypatch.undo()
    monkeypatch.setattr("eckart.storage.report_file.write_file", denied)
    with refused("Permission denied", "another file"):
        write_report(tmp_path / "report.json", CONTENT)


def test_report_goes_to_a_stream(tmp_path):
    write_report("/dev/null", CONTENT)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_report(tmp_path / "pipe", CONTENT)
    assert json.loads(os.read(reader, 10_000)) == STORED
    os.close(reader)
