"""Tasks of lm_eval: scored as lm_eval does it, beside the original, without a network; its own command line."""

import json
import sys

import pytest
import torch
from test_data_models import bert_config, build, word_tokenizer
from tiny import llama
from tiny import place as save_tiny
from transformers import BertForMaskedLM, BertForSequenceClassification
from typer.testing import CliRunner

import eckart
from eckart.cli.app import app
from eckart.errors import DataError, UsageError
from eckart.evaluation.scorers.harness import describe_errors, find_tasks, list_metrics

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'eckart[eval]'")

SOURCE = "task: toy_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
TASKS = {
    "one": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "two": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, the same made smaller, and two tasks."""
    place = tmp_path_factory.mktemp("harness")
    rows = [
        {"question": f"import the module number {i}", "choices": [" def", " a purple thing", " x = 1"], "answer": i % 3}
        for i in range(8)
    ]
    (place / "tasks").mkdir()
    file = place / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (place / "tasks" / f"{name}.yaml").write_text(SOURCE.format(name=name, rows=file) + text)
    save_tiny(llama(num_hidden_layers=1), place / "llama", torch.float32)
    eckart.compress(str(place / "llama"), method="svd", keep=0.3, dtype="float32", output_dir=place / "small")
    return place


@pytest.fixture(scope="module")
def scored(folder):
    options = {"lm_eval": "toy_*", "include_path": str(folder / "tasks"), "limit": 6, "baselines": False}
    return eckart.evaluate(folder / "small", folder / "llama", latency=False, device="cpu", **options)


def test_scores_are_those_of_lm_eval_itself(folder, scored):
    """The folder under its name, as `lm_eval --model hf --model_args pretrained=DIR` loads it."""
    from lm_eval.tasks import TaskManager

    for column, name in (("eckart", "small"), ("original", "llama")):
        found = lm_eval.simple_evaluate(
            "hf", f"pretrained={folder / name},dtype=float32", ["toy_one", "toy_two"], limit=6, device="cpu",
            task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False), log_samples=False,
        )  # fmt: skip
        expected = {
            "toy_one acc": found["results"]["toy_one"]["acc,none"],
            "toy_one acc_norm": found["results"]["toy_one"]["acc_norm,none"],
            "toy_two bits_per_byte": found["results"]["toy_two"]["bits_per_byte,none"],
        }
        assert {key: row[column] for key, row in scored["scores"].items()} == pytest.approx(expected)
        assert scored["details"][column]["results"]["toy_one"]["acc_stderr,none"] == pytest.approx(
            found["results"]["toy_one"]["acc_stderr,none"]
        )
    bits = scored["scores"]["toy_two bits_per_byte"]
    assert abs(bits["eckart"] - bits["original"]) > 1e-3


def test_report_says_what_was_scored_and_is_plain_json(scored):
    assert json.loads(json.dumps(scored)) == scored
    assert scored["task"] == "lm-eval"
    assert scored["protocol"] == f"lm_eval {lm_eval.__version__}: 2 tasks, 12 rows; examples in the prompt: 0"
    assert set(scored["sizes"]["elements"]) == {"original", "eckart"}
    assert scored["details"]["eckart"]["n-samples"]["toy_one"] == {"original": 8, "effective": 6}


def test_command_shows_the_table_and_writes_the_file(folder, tmp_path):
    words = ["eval", str(folder / "small"), "--lm-eval", "toy_one", "--include-path", str(folder / "tasks"),
             "--num-fewshot", "1", "--limit", "0.5", "--no-latency", "--device", "cpu",
             "--json", str(tmp_path / "r.json")]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "4 rows; examples in the prompt: 1" in done.output
    assert "toy_one acc_norm" in done.output
    assert "standard errors: toy_one acc 0." in done.output
    written = json.loads((tmp_path / "r.json").read_text())
    assert set(written["scores"]["toy_one acc"]) == {"eckart"}


def test_file_of_a_task_may_be_named(folder):
    manager, tasks = find_tasks([str(folder / "tasks/one.yaml")], None)
    assert tasks == [str(folder / "tasks/one.yaml")]
    assert list(manager.load(tasks)["tasks"]) == ["toy_one"]


def test_metrics_have_the_names_that_lm_eval_gives_them():
    found = {
        "groups": {"all": {"acc,none": 0.5, "alias": "all"}},
        "results": {"a": {"exact_match,strict-match": 1, "exact_match_stderr,strict-match": "N/A", "sample_len": 3}},
    }
    assert list_metrics(found) == {"all acc": 0.5, "a exact_match (strict-match)": 1.0}
    assert describe_errors(found) is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lm_eval": "toy_one", "data": "stdlib"}, "data is of no use"),
        ({"lm_eval": "toy_one", "task": "perplexity"}, "task is of no use"),
        ({"limit": 3}, "limit: only tasks of lm_eval"),
        ({"lm_eval": "toy_one", "include_path": "no/such/folder"}, "no such folder"),
        ({"lm_eval": " , "}, "no task without a name"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, options, match):
    with pytest.raises(UsageError, match=match):
        eckart.evaluate(folder / "small", latency=False, device="cpu", **options)


def test_unknown_task_is_named(folder, monkeypatch):
    from lm_eval.tasks import manager

    monkeypatch.setattr(manager, "__file__", str(folder / "tasks" / "x.py"))  # as if these were all that it brings
    with pytest.raises(UsageError, match=r"no task toy_three.*lm-eval ls tasks"):
        find_tasks(["toy_one", "toy_three"], None)
    assert find_tasks(["toy_one"], None)[1] == ["toy_one"]


def test_task_that_cannot_be_scored_is_named(folder, tmp_path):
    text = (folder / "tasks/one.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(text.replace("toy_one", "bad").replace("rows.jsonl", "gone.jsonl"))
    with pytest.raises(DataError, match="--lm-eval bad: FileNotFoundError"):
        eckart.evaluate(folder / "small", lm_eval="bad", include_path=str(tmp_path), latency=False, device="cpu")


@pytest.mark.parametrize("head", [BertForSequenceClassification, BertForMaskedLM])
def test_models_that_write_no_text_are_refused(head):
    with pytest.raises(UsageError, match=f"{head.__name__} does not"):
        eckart.evaluate(build(head, bert_config()), None, word_tokenizer(), lm_eval="toy_one")


def test_missing_library_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(UsageError, match=r"pip install 'eckart\[eval\]'"):
        eckart.evaluate(folder / "small", lm_eval="toy_one", device="cpu")
    done = CliRunner().invoke(app, ["lm-eval", "ls"])
    assert done.exit_code == 2
    assert "eckart[eval]" in done.output


def test_command_line_of_lm_eval_is_handed_on_as_it_is(monkeypatch):
    import lm_eval.__main__ as harness

    seen = []
    monkeypatch.setattr(harness, "cli_evaluate", lambda: seen.append(sys.argv[:]))
    before = sys.argv
    words = ["run", "--model", "hf", "--model_args", "pretrained=a_b,dtype=float32", "--tasks", "x", "-h", "--help"]
    assert CliRunner().invoke(app, ["lm-eval", *words]).exit_code == 0
    assert seen == [["lm_eval", *words]]
    assert sys.argv is before
