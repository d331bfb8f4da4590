"""What a run says of its stages: words, bars, and how long the rest takes, by a clock that the test moves."""

import io

import pytest
from huggingface_hub.utils import enable_progress_bars

from eckart import progress
from eckart.progress import Outlook, Stage, describe_seconds, show_bar


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def outlook_of(clock, *stages, **more):
    said = []
    return Outlook(stages, said.append, clock=clock, **more), said


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3, "a few seconds"), (9.9, "a few seconds"), (10, "about 10 seconds"), (37, "about 40 seconds"),
        (55, "about a minute"), (89, "about a minute"), (91, "about 2 minutes"), (239, "about 4 minutes"),
        (3_500, "about 58 minutes"), (3_600, "about an hour"), (5_500, "about 1.5 hours"), (72_000, "about 20 hours"),
    ],
)  # fmt: skip
def test_times_that_are_not_known_well_are_said_in_round_words(seconds, words):
    assert describe_seconds(seconds) == words


def test_before_the_first_stage_a_short_timing_tells(clock):
    outlook, _ = outlook_of(clock, Stage("one", 4), Stage("two", 6, seconds=3), pass_seconds=2)
    assert outlook.seconds == outlook.left == 4 * 2 + 6 * 2 + 3
    unknown, _ = outlook_of(clock, Stage("one", 4), Stage("two", 0, seconds=3))
    assert unknown.left is None
    only_seconds, _ = outlook_of(clock, Stage("one", seconds=5))
    assert only_seconds.left == 5


def test_stages_that_are_done_tell_better(clock):
    outlook, said = outlook_of(clock, Stage("one", 4), Stage("two", 6), Stage("three", 2, seconds=5), pass_seconds=2)
    outlook.enter("one")
    clock.now += 6
    assert outlook.left == 2 + 12 + 4 + 5
    clock.now += 34  # ten seconds a pass so far: what follows takes as long
    assert outlook.left == 60 + 20 + 5
    outlook.enter("two")
    assert outlook.left == 60 + 20 + 5
    clock.now += 6  # fast, but what a stage takes is known at its end
    assert outlook.left == 54 + 20 + 5
    outlook.enter("three")
    assert outlook.left == pytest.approx(2 * 46 / 10 + 5)
    clock.now += 100
    assert outlook.left == 0
    assert outlook.seconds == 146
    assert said == [
        "stage 1 of 3: one; about 30 seconds left",
        "stage 2 of 3: two; about a minute left",
        "stage 3 of 3: three; about 10 seconds left",
    ]


def test_a_loop_tells_of_the_stage_that_runs(clock):
    outlook, said = outlook_of(clock, Stage("one", 4), Stage("two", 6))
    outlook.enter("one")
    assert said == ["stage 1 of 2: one"]
    clock.now += 10
    outlook.follow(1, 100, 10.0)
    assert outlook.left is None  # too early to say
    outlook.follow(25, 100, 10.0)
    assert outlook.left == 30 + 60  # ten seconds for each pass
    outlook.follow(25, None, 10.0)  # a loop of unknown length tells nothing new
    assert outlook.left == 30 + 60
    known, _ = outlook_of(clock, Stage("one", 4), pass_seconds=1)
    known.enter("one")
    known.follow(1, 2, 50.0)
    assert known.left == 50  # longer than the short timing says
    both, _ = outlook_of(clock, Stage("one", 4), Stage("two", seconds=3), pass_seconds=1)
    both.enter("one")
    both.follow(1, 2, 50.0)
    both.enter("two")
    assert both.left == 3  # the loop was that of the stage before


def test_stages_that_take_turns_are_both_open_until_a_later_one_begins(clock):
    outlook, said = outlook_of(clock, Stage("one", 4, turns=True), Stage("two", 4), Stage("three", 1), pass_seconds=5)
    for name, seconds in (("one", 3), ("two", 2), ("one", 3), ("two", 2), ("one", 0)):
        outlook.enter(name)
        clock.now += seconds
    assert outlook.spent == [6, 4, 0]
    assert outlook.left == 14 + 16 + 5
    outlook.enter("two")
    assert outlook.left == 14 + 16 + 5
    outlook.enter("three")
    assert outlook.left == pytest.approx(10 / 8)
    assert [line.split(";")[0] for line in said] == [f"stage {i} of 3: {name}" for i, name in
                                                     enumerate(("one", "two", "three"), 1)]  # fmt: skip


def test_going_back_opens_a_stage_again(clock):
    outlook, _ = outlook_of(clock, Stage("one", 4), Stage("two", 4), pass_seconds=5)
    for name in ("one", "two", "one"):
        outlook.enter(name)
        clock.now += 1
    assert outlook.left == 18 + 19
    outlook.enter("two")
    assert outlook.left == 18 + 19  # and it stays open


def test_a_name_that_no_stage_has_belongs_to_the_stage_that_runs(clock):
    outlook, said = outlook_of(clock, Stage("one", 4), Stage("two", 4), pass_seconds=5)
    outlook.enter("one")
    clock.now += 1
    outlook.enter("something")
    clock.now += 1
    outlook.enter("two")
    assert outlook.spent[0] == 2
    assert len(said) == 2


# -- on a terminal -----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def open_terminal(monkeypatch):
    """Called in the test itself: pytest puts its own streams in place after the fixtures are made."""

    def open_one():
        enable_progress_bars()  # a command that has run elsewhere in this process may have switched them off
        stream = Terminal()
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    monkeypatch.setattr(progress.tqdm, "monitor_interval", 0)  # else a thread looks after the bars
    return open_one


def test_a_terminal_has_a_bar_of_the_stage_and_one_of_the_run(open_terminal, clock):
    terminal = open_terminal()
    outlook, said = outlook_of(clock, Stage("one", 4), Stage("two", 12), pass_seconds=10)
    with outlook:
        outlook.enter("one")
        for _ in show_bar(range(3), what="working", mininterval=0, miniters=1):
            clock.now += 10
        outlook.enter("two")
        shown = terminal.getvalue()
        clock.now += 7
    assert "working:  67%" in shown
    assert "stage 1 of 2, about 2 minutes left |" in shown
    bars = [line for line in shown.split("\r") if line.startswith("stage 1")]
    assert any("#" in line for line in bars)
    assert "stage 2 of 2, about 2 minutes left |" in shown
    assert said == ["stage 1 of 2: one, 30.0 s", "stage 2 of 2: two, 7.0 s"]
    after = terminal.getvalue()
    list(show_bar(range(3), what="later"))
    assert "stage" not in terminal.getvalue()[len(after) :]


def test_elsewhere_there_are_lines_and_no_bars(clock, capsys):
    outlook, said = outlook_of(clock, Stage("one", 4), Stage("two", 12), pass_seconds=10)
    with outlook:
        outlook.enter("one")
        list(show_bar(range(3), what="working"))
    assert capsys.readouterr().err == ""
    assert said == ["stage 1 of 2: one; about 3 minutes left"]


def test_of_a_run_inside_another_the_outer_one_is_shown(open_terminal, clock):
    terminal = open_terminal()
    outer, _ = outlook_of(clock, Stage("outer", 4), pass_seconds=1)
    inner, _ = outlook_of(clock, Stage("inner", 4), Stage("more", 1), pass_seconds=1)
    with outer:
        outer.enter("outer")
        with inner:
            inner.enter("inner")
            list(show_bar(range(2), what="working", mininterval=0))
        outer.draw()
    assert "stage 1 of 1" in terminal.getvalue()
    assert "of 2" not in terminal.getvalue()


def test_a_run_that_fails_leaves_no_line_as_if_it_were_done(open_terminal, clock):
    open_terminal()
    outlook, said = outlook_of(clock, Stage("one", 4), pass_seconds=1)
    outlook.__enter__()
    outlook.enter("one")
    outlook.__exit__(ValueError, ValueError("broken"), None)
    assert said == []
    assert progress._running is None


def test_what_takes_long_is_said_once_with_how_it_takes_less(clock):
    told = []
    for seconds in (10, 100):
        outlook, said = outlook_of(clock, *(Stage(name, 1) for name in "abcde"), hint="less text: --max-tokens")
        for name in "abc":
            outlook.enter(name)
            clock.now += seconds
        told.append([line.partition(" left")[2] for line in said])
    assert told == [["", "", ""], ["", " (less text: --max-tokens)", ""]]
