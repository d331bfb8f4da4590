"""Files, columns and labeled rows."""

from __future__ import annotations

import json

import pytest

from eckart.data import load_task
from eckart.data.columns import find_label_column, find_text_column, peek_rows, text_of
from eckart.data.rows import DataRow, read_path
from eckart.errors import DataError


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def values(path, **more):
    return [row.values for row in read_path(path, **more)]


def test_text_file_by_line_and_whole(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\r\n\r\ntwo")
    rows = list(read_path(path))
    assert [row.values["text"] for row in rows] == ["one", "", "two"]
    assert [row.where for row in rows] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert values(path, whole_text=True) == [{"text": "one\r\n\r\ntwo"}]


def test_csv_with_header_quotes_and_line_breaks(tmp_path):
    path = write(tmp_path / "a.csv", '\ufefftext,label\n"one, ""two""\nthree",1\n\nfour,0\n')
    rows = list(read_path(path))
    assert rows[0].values == {"text": 'one, "two"\nthree', "label": "1"}
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:5"]


def test_csv_without_header_has_numbered_columns(tmp_path):
    path = write(tmp_path / "stsb.csv", "A man sits.,A man sat.,4.5\nA dog.,A cat.,1.0\n")
    assert values(path)[0] == {"0": "A man sits.", "1": "A man sat.", "2": "4.5"}
    words = write(tmp_path / "words.csv", "one,two\nthree,four\n")
    assert values(words) == [{"one": "three", "two": "four"}]
    assert values(words, asked=("0", "1"))[0] == {"0": "one", "1": "two"}
    years = write(tmp_path / "years.csv", "2019,2020\n1,2\n")
    assert values(years, asked=("2020",)) == [{"2019": "1", "2020": "2"}]


def test_tsv_takes_quotes_as_characters(tmp_path):
    path = write(tmp_path / "mrpc.tsv", '\ufeffQuality\t#1 String\n1\tHe said "no.\n0\t"Yes\n')
    assert values(path) == [{"Quality": "1", "#1 String": 'He said "no.'}, {"Quality": "0", "#1 String": '"Yes'}]


def test_folder_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.jsonl", '{"text": "first"}\n')
    write(tmp_path / "sub" / "c.csv", "text\nthird\n")
    write(tmp_path / "notes.md", "no")
    rows = list(read_path(tmp_path))
    assert [row.values["text"] for row in rows] == ["first", "second", "third"]
    assert [row.index for row in rows] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', ("a.jsonl:2", "JSON")),
        ("a.jsonl", '{"text": "x"}\n[1]\n', ("a.jsonl:2", "list")),
        ("a.txt", b"fine\nnot \xff fine\n", ("a.txt:2", "UTF-8")),
        ("a.csv", b"text\nfine\nnot \xff fine\n", ("a.csv:3", "UTF-8")),
        ("a.csv", 'text,b\nx,1\n"open,2\ny,3\n', ("a.csv:3", "quote")),
        ("a.csv", "text,b\nx,1,2\n", ("a.csv:2", "3 cells", "quote")),
        ("a.json", "{}", ("a.json", ".jsonl", "convert")),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, parts):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        list(read_path(path))
    for part in parts:
        assert part in str(caught.value)


def test_empty_folder_names_the_suffixes(tmp_path):
    with pytest.raises(DataError, match=r"\.txt, \.jsonl, \.csv, \.tsv"):
        list(read_path(tmp_path))


def rows_of(*records):
    return [DataRow(record, f"f.jsonl:{line}", line - 1) for line, record in enumerate(records, 1)]


def test_text_column_is_asked_named_or_alone():
    assert find_text_column(rows_of({"a": "x y", "n": 3}), "f", asked=None) == "a"
    assert find_text_column(rows_of({"a": "x", "text": "y"}), "f", asked=None) == "text"
    assert find_text_column(rows_of({"a": "x", "text": "y"}), "f", asked="a") == "a"
    assert find_text_column(rows_of({"a": "x", "b": "1.5"}), "f", asked=None) == "a"
    assert find_text_column(rows_of({"a": "x", "b": "y"}), "f", asked=None, taken=("b",)) == "a"
    assert find_text_column(rows_of({"m": [{"role": "user", "content": "x"}], "n": 1}), "f", asked=None) == "m"
    with pytest.raises(DataError, match=r"'a', 'b'.*--data-column"):
        find_text_column(rows_of({"a": "x", "b": "y"}), "f", asked=None)
    with pytest.raises(DataError, match=r"no column 'c'.*'a', 'b'"):
        find_text_column(rows_of({"a": "x", "b": "y"}), "f", asked="c")


def test_label_column_is_asked_named_or_alone():
    assert find_label_column(rows_of({"a": "x", "n": 3}), "f", asked=None) == "n"
    assert find_label_column(rows_of({"id": 3, "label": "good"}), "f", asked=None) == "label"
    with pytest.raises(DataError, match="which column holds the label"):
        find_label_column(rows_of({"a": 1, "b": 2}), "f", asked=None)


def test_rows_without_the_column_are_named():
    with pytest.raises(DataError, match=r"f\.jsonl:1: no value in column 'text'"):
        text_of(rows_of({"other": "x"})[0], "text")
    with pytest.raises(DataError, match=r"f\.jsonl:1: column 'text' holds a int"):
        text_of(rows_of({"text": 3})[0], "text")


def test_peek_loses_nothing():
    rows = rows_of(*({"text": str(n)} for n in range(250)))
    first, again = peek_rows(iter(rows), "f")
    assert first == rows[:100]
    assert list(again) == rows
    with pytest.raises(DataError, match="no rows"):
        peek_rows(iter([]), "f")


def test_task_from_every_format(tmp_path):
    write(tmp_path / "a.tsv", "good film\t1\nbad film\t0\n")
    write(tmp_path / "a.csv", "sentence,label\ngood film,1\nbad film,0\n")
    write(tmp_path / "a.jsonl", '{"sentence": "good film", "label": 1}\n{"sentence": "bad film", "label": 0}\n')
    for name in ("a.tsv", "a.csv", "a.jsonl"):
        task = load_task(tmp_path / name)
        assert [text.text for text in task.texts] == ["good film", "bad film"]
        assert task.labels == [1, 0]
        assert all(isinstance(label, int) for label in task.labels)
        assert json.dumps(task.description)


def test_task_of_pairs_with_scores(tmp_path):
    path = write(tmp_path / "stsb.csv", "A man sits.,A man sat.,5.0\nA dog.,A cat.,1.0\n")
    task = load_task(path, column="0", pair_column="1", label="2")
    assert task.rows[1].text.pair == "A cat."
    assert task.labels == [5.0, 1.0]
    assert load_task(path, column="0", pair_column="1", label="2", regression=False).labels == [5, 1]
    assert len(load_task(path, column="0", pair_column="1", label="2", num_samples=1)) == 1


def test_task_labels_that_are_words(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\nfine\tpos\nawful\tneg\n")
    assert load_task(path, label2id={"neg": 0, "pos": 1}).labels == [1, 0]
    with pytest.raises(DataError, match=r"a\.tsv:2: label 'pos'.*label2id"):
        load_task(path)


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [("-1", {}, "not a class"), ("1.5", {"regression": False}, "not a class"), ("nan", {"regression": True}, "finite")],
)
def test_task_labels_that_are_wrong(tmp_path, label, options, message):
    path = write(tmp_path / "a.tsv", f"text\tlabel\nfine\t1\nawful\t{label}\n")
    with pytest.raises(DataError, match=rf"a\.tsv:3: label .*{message}"):
        load_task(path, **options)


def test_task_with_a_short_row(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\nfine\t1\nawful\n")
    with pytest.raises(DataError, match=r"a\.tsv:3: no value in column 'label'"):
        load_task(path)


def test_a_first_row_that_holds_the_number_of_a_column_is_no_header(tmp_path):
    path = write(tmp_path / "train.tsv", "a fine film\t1\na dull one\t0\n")
    assert [list(row.items()) for row in values(path, asked=("0", "1"))] == [
        [("0", "a fine film"), ("1", "1")],
        [("0", "a dull one"), ("1", "0")],
    ]
    write(path, "0\t1\na fine film\t1\n")
    assert [list(row.items()) for row in values(path, asked=("0", "1"))] == [[("0", "a fine film"), ("1", "1")]]
