"""How much a command says: --quiet, --verbose, and --json on every command that prints results."""

import json
import logging

import pytest
import transformers
import typer
from huggingface_hub import utils as hub_utils
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from tiny import llama, place, text

from eckart.cli.app import app
from eckart.cli.console import guarded, say, set_up_logging
from eckart.cli.manner import MANNER, quieten_bars, set_quiet
from eckart.compression.memory_estimate import CACHE_MEMORY
from eckart.config import DEFAULT_BATCH_SIZE, DEFAULT_TEXTS, DEFAULT_TOKENS, DEFAULT_WINDOWS
from eckart.evaluation.perplexity import WINDOW
from eckart.registry import METHODS
from eckart.report.page.folder import find_sources


@pytest.fixture(autouse=True)
def as_before():
    """The command line sets how loud this process is."""
    level, hub = transformers.logging.get_verbosity(), hub_utils.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(level)
    hub_utils.logging.set_verbosity(hub)
    set_quiet(False)
    quieten_bars()
    MANNER.json_alone = False
    logging.getLogger("eckart").handlers.clear()
    logging.getLogger("eckart").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return place(llama(), tmp_path_factory.mktemp("model") / "llama")


def run(capsys, *words):
    with pytest.raises(SystemExit) as left:
        app([str(word) for word in words])
    found = capsys.readouterr()
    assert not left.value.code, found.err
    return found


def compress(model, output, *more):
    return ["compress", model, "--method", "svd", "--keep", "0.6", "--output-dir", output, "--no-verify", *more]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_quiet_command_says_where_the_result_is_and_nothing_else(first, model, tmp_path, capsys):
    words = ["--quiet", *compress(model, tmp_path / "out")] if first else compress(model, tmp_path / "out", "-q")
    found = run(capsys, *words)
    assert found.out == f"{tmp_path / 'out'}\n"
    assert found.err == ""
    loud = run(capsys, *compress(model, tmp_path / "loud"))
    assert "whole model, after" in loud.out
    assert "report: " in loud.err


def test_warnings_and_errors_are_said_all_the_same(model, tmp_path, capsys):
    set_quiet(True)
    for style in ("", "dim", "yellow", "red"):
        say(f"in {style}.", style)
    assert capsys.readouterr().err == "in yellow.\nin red.\n"
    with pytest.raises(SystemExit) as left:
        app([*map(str, compress(tmp_path / "nothing", tmp_path / "out")), "--quiet"])
    assert left.value.code
    assert "error: " in capsys.readouterr().err


def test_each_warning_of_a_command_is_said_once(capsys):
    set_up_logging(verbose=False)
    logger = logging.getLogger("eckart.some")

    @guarded
    def command():
        for message in ("one", "two", "one"):
            logger.warning(message)

    for _ in range(2):  # of the next command again
        command()
        assert capsys.readouterr().err == "warning: one\nwarning: two\n"


def test_a_quiet_command_has_no_bars_and_the_next_one_has():
    enable_progress_bars()
    set_quiet(True)
    quieten_bars()
    assert are_progress_bars_disabled("eckart")
    set_quiet(False)
    quieten_bars()
    assert not are_progress_bars_disabled("eckart")


def test_a_command_can_be_told_to_log_behind_its_name_too(capsys):
    for words, level in ((["methods"], logging.WARNING), (["methods", "--verbose"], logging.INFO)):
        run(capsys, *words)
        assert logging.getLogger("eckart").level == level


def test_what_is_published_is_also_told_as_json(model, tmp_path, capsys):
    run(capsys, *compress(model, tmp_path / "out", "--json", tmp_path / "c.json"))
    found = json.loads((tmp_path / "c.json").read_text())
    inside = json.loads((tmp_path / "out/eckart/report.json").read_text())
    assert found == {"written_by": "eckart", "output_dir": str(tmp_path / "out"), **inside}
    assert [source.found for source in find_sources(tmp_path / "c.json")] == [found]
    run(capsys, "export", tmp_path / "out", "--output-dir", tmp_path / "dense", "--json", tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["output_dir"] == str(tmp_path / "dense")
    size = (tmp_path / "dense/model.safetensors").stat().st_size
    assert found["files"]["model.safetensors"] == size


def test_tuning_is_told_as_json(model, tmp_path, capsys):
    run(capsys, *compress(model, tmp_path / "small"))
    words = ["--recovery", "refit", "--teacher", model, "--data", text(tmp_path), "--num-samples", 64,
             "--max-seq-length", 16, "--no-verify", "--output-dir", tmp_path / "out", "--json", "-"]  # fmt: skip
    found = run(capsys, "tune", tmp_path / "small", *words)
    assert json.loads(found.out)["kind"] == "tune"


def test_json_on_standard_output_stands_there_alone(capsys):
    found = run(capsys, "methods", "--json", "-")
    assert [*json.loads(found.out)["methods"]] == [*METHODS]
    assert "methods (--method, --metric)" in run(capsys, "methods").out


def test_every_command_that_prints_results_takes_json():
    commands = typer.main.get_command(app).commands
    taking = {name for name, command in commands.items() if any("--json" in p.opts for p in command.params)}
    assert taking == {*commands} - {"report", "push", "lm-eval"}  # they print the place of what they have written
    quiet = {name for name, command in commands.items() if any("--quiet" in p.opts for p in command.params)}
    assert quiet == {*commands} - {"lm-eval"}  # every word after it is lm_eval's


def test_help_says_what_every_option_is_where_it_is_not_given():
    for name, command in typer.main.get_command(app).commands.items():
        for option in command.params:
            words = getattr(option, "help", None) or ""
            told = "Default: " in words or option.show_default or option.required or option.hidden
            assert told or option.param_type_name == "argument", (name, option.opts)
    help_of = {option.opts[0]: option.help for option in typer.main.get_command(app).commands["compress"].params[1:]}
    for flag, value in (("--num-samples", f"{DEFAULT_WINDOWS} windows"), ("--num-samples", f"{DEFAULT_TEXTS:,} texts"),
                        ("--max-seq-length", str(DEFAULT_TOKENS)), ("--batch-size", str(DEFAULT_BATCH_SIZE)),
                        ("--cache-memory", str(CACHE_MEMORY)), ("--strict", "no"), ("--seed", "0")):  # fmt: skip
        assert value in help_of[flag].split("Default: ")[1]
    of_eval = {option.opts[0]: option.help for option in typer.main.get_command(app).commands["eval"].params[1:]}
    assert f"{WINDOW:,} for perplexity, else {DEFAULT_TOKENS}" in of_eval["--max-seq-length"]
    assert f"{DEFAULT_BATCH_SIZE}, of labeled rows 32" in of_eval["--batch-size"]
