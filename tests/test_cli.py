"""The command line, in this process; what must hold in a fresh process is tried in one."""

import html
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import reports
import torch
import transformers
import yaml
from huggingface_hub import utils as hub_utils
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

import eckart
from eckart.cli.app import app
from eckart.compression.recipe import Recipe
from eckart.data import require_data
from eckart.forms import EMBEDDINGS
from eckart.methods import METHODS
from eckart.recovery import RECOVERIES
from eckart.report.compression import render_compression
from eckart.report.words import to_plain_text

TEXT = "the a cat dog bird tree river house runs sees likes finds small big red old new and in on"
WORDS = TEXT.split()


@pytest.fixture(autouse=True)
def quiet_again():
    """The command line sets how loud the libraries are; other tests start from what was before."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    hub = hub_utils.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    transformers.logging.set_verbosity(level)
    hub_utils.logging.set_verbosity(hub)
    if bars:
        transformers.logging.enable_progress_bar()
    logger = logging.getLogger("eckart")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


def words_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[EOS]"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def sentences(count: int, seed: int = 0) -> list[str]:
    stream = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=stream).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=stream).tolist()) for n in lengths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models and texts, made once."""
    folder = tmp_path_factory.mktemp("folder")
    tokenizer = words_tokenizer()
    torch.manual_seed(0)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=5, **tiny)
    )
    llama.to(torch.bfloat16).save_pretrained(folder / "llama")
    bert = BertConfig(vocab_size=32, max_position_embeddings=64, num_labels=2, **tiny)
    BertForSequenceClassification(bert).save_pretrained(folder / "classifier")
    BertModel(bert).save_pretrained(folder / "bert")
    for name in ("llama", "classifier", "bert"):
        tokenizer.save_pretrained(folder / name)
    llama.save_pretrained(folder / "mute")
    (folder / "text.txt").write_text("\n".join(sentences(400)))
    (folder / "held.txt").write_text("\n".join(sentences(60, seed=1)))
    pairs = zip(sentences(40, 2), sentences(40, 3), strict=True)
    rows = [f"{text},{other},{i % 2}" for i, (text, other) in enumerate(pairs)]
    (folder / "rows.csv").write_text("\n".join(["sentence,other,label", *rows]))
    return folder


@pytest.fixture
def cli(capsys):
    """Run a command; what it printed, and its exit code."""

    def run(*words, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            app([str(word) for word in words])
        found = capsys.readouterr()
        text = f"{found.out}\n{found.err}"
        assert (left.value.code or 0) == code, text
        assert "Traceback" not in text
        if code:
            assert found.out == ""
        return text

    return run


SMALL = ("--num-samples", "24", "--max-seq-length", "32")


@pytest.fixture(scope="module")
def published(folder) -> Path:
    """A compressed Llama."""
    with pytest.raises(SystemExit) as left:
        app(["compress", str(folder / "llama"), "--keep", "0.6", "--data", str(folder / "text.txt"), *SMALL,
             "--output-dir", str(folder / "llama-60")])  # fmt: skip
    assert not left.value.code
    return folder / "llama-60"


def raises(error: BaseException) -> None:
    raise error


def fresh(code: str, *words) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- compress ----------------------------------------------------------------------------------------


def test_report_tells_the_sizes_of_the_published_files(published):
    report = json.loads((published / "eckart/report.json").read_text())
    numbers = size = 0
    for path in published.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        numbers += sum(tensor.numel() for tensor in tensors)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    after = report["sizes"]["model"]["after"]
    assert (after["elements"], after["bytes"]) == (numbers, size)
    assert report["kept"]["of_sites"] <= 0.6
    assert json.loads((published / "config.json").read_text())["dtype"] == "bfloat16"  # the checkpoint's own
    with safe_open(published.parent / "llama" / "model.safetensors", "pt") as file:
        before = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert report["sizes"]["model"]["before"]["bytes"] == sum(t.numel() * t.element_size() for t in before)


def test_compress_prints_table_folder_and_lines_to_load(cli, folder, tmp_path):
    text = cli("compress", folder / "bert", "--keep", 0.5, "--data", folder / "text.txt", *SMALL, "--form", "lowrank",
               "--output-dir", tmp_path / "out")  # fmt: skip
    for words in ("kind of site", "whole model", "keep 0.5", f"published in {tmp_path / 'out'}",
                  f'AutoModel.from_pretrained("{tmp_path / "out"}")'):  # fmt: skip
        assert words in text


def test_flags_override_the_run_file(cli, folder, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"model": str(folder / "llama"), "method": "svd", "keep": 0.8, "form": "pivoted",
                                   "output-dir": str(tmp_path / "from-file"), "overwrite": True}))  # fmt: skip
    cli("compress", "--config", run)
    cli("compress", "--config", run, "--keep", 0.5, "--output_dir", tmp_path / "from-line", "--keep_of", "sites")
    kept = {}
    for name in ("from-file", "from-line"):
        recipe = yaml.safe_load((tmp_path / name / "eckart/recipe.yaml").read_text())
        assert (recipe["method"], recipe["form"]) == ("svd", "pivoted")
        kept[name] = recipe["keep"]
    assert kept == {"from-file": 0.8, "from-line": 0.5}
    cli("compress", "--config", tmp_path / "from-line/eckart/recipe.yaml", "--output-dir", tmp_path / "again")
    plans = [(tmp_path / name / "eckart/plan.json").read_text() for name in ("from-line", "again")]
    assert plans[0] == plans[1]


def test_compress_follows_an_edited_plan(cli, folder, published, tmp_path):
    plan = json.loads((published / "eckart/plan.json").read_text())
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
    plan["sites"][first] = {"form": "dense"}
    plan["sites"][second] = {"form": "lowrank", "rank": 3}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    cli("compress", folder / "llama", "--plan", tmp_path / "plan.json", "--data", folder / "text.txt", *SMALL,
        "--output-dir", tmp_path / "out")  # fmt: skip
    rows = {row["site"]: row for row in json.loads((tmp_path / "out/eckart/report.json").read_text())["sites"]}
    assert rows[first]["form"] == "dense"
    assert (rows[second]["form"], rows[second]["rank"]) == ("lowrank", 3)


def test_a_warning_is_shown_once_and_no_note_besides(cli, folder, tmp_path):
    few = ("--data", folder / "text.txt", "--num-samples", "1", "--batch-size", "1", "--max-seq-length", "32")
    for how in ((), ("--quiet",)):
        text = cli("compress", folder / "llama", *few, *how, "--output-dir", tmp_path / f"out{len(how)}")
        assert text.count("sites that saw fewer tokens than they have features") == 1
        assert text.count("warning: sites that saw fewer") == 1
    report = json.loads((tmp_path / "out0/eckart/report.json").read_text())
    assert sum("saw fewer tokens" in note for note in report["notes"]) == 1


def test_notes_that_were_not_warned_of_are_shown():
    report = {**reports.compression(), "ranks": {}, "notes": ["one", "two"]}
    assert "2 notes:\n  one\n  two" in to_plain_text(render_compression(report))
    said = to_plain_text(render_compression(report, warned={"two", "three"}))
    assert "2 notes, of which 1 was shown above, as a warning:\n  one\n" in said
    assert "two\n" not in said
    said = to_plain_text(render_compression(report, warned={"one", "two"}))
    assert "2 notes, of which 2 were shown above, as warnings\n" in said


def command_of(published: Path) -> list[str]:
    """The command on a page that makes its folder again, and above it what has to be known for it."""
    page = html.unescape((published / "eckart/report.html").read_text())
    comments, command = re.search(r"((?:# .*\n)+)(eckart compress .*--output-dir [\w.-]+)", page).groups()
    return [comments, *shlex.split(command)[1:]]


def test_the_line_that_makes_a_folder_again_does_so_where_it_was_run(cli, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").symlink_to(folder / "llama")
    (tmp_path / "text.txt").write_text((folder / "text.txt").read_text())
    cli("compress", "own", "--data", "text.txt", "--method", "drone", *SMALL, "--output-dir", "small")
    comments, *command = command_of(tmp_path / "small")
    assert "it reads model own, data text.txt: run it in the folder where it was run" in comments
    assert str(tmp_path) not in (tmp_path / "small/eckart/recipe.yaml").read_text()
    cli(*command)
    plans = [(tmp_path / name / "eckart/plan.json").read_text() for name in ("small", "small-again")]
    assert plans[0] == plans[1]


def test_the_line_that_makes_a_folder_again_asks_for_what_python_gave_as_objects(cli, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    lines = (folder / "text.txt").read_text().splitlines()
    eckart.compress(model, words_tokenizer(), data=lines, method="drone", num_samples=24, max_seq_length=32,
                    output_dir="small")  # fmt: skip
    comments, *command = command_of(tmp_path / "small")
    assert "# MODEL: the folder or hub name of the model; it was given as an object in Python" in comments
    assert "# DATA: a file of the text" in comments
    meant = {"MODEL": folder / "llama", "DATA": folder / "text.txt"}
    cli(*(meant.get(word, word) for word in command))
    assert (tmp_path / "small-again/eckart/report.html").is_file()
    said = cli("compress", "--config", "small/eckart/recipe.yaml", "--output-dir", "third", code=2)
    assert "MODEL is missing: --config small/eckart/recipe.yaml names none" in said


REFUSALS = {
    "near miss of a method": (2, ["llama", "--method", "dron"], ["'dron'", "Did you mean 'drone'?"]),
    "near miss of a field in a run file": (2, ["--config", "typo.yaml"], ["typo.yaml", "'kep'", "'keep'"]),
    "a value out of range": (2, ["llama", "--keep", "1.5"], ["keep", "1.5"]),
    "a percentage": (2, ["llama", "--keep", "60"], ["--keep 60: a fraction", "for 60 % give --keep 0.6"]),
    "words for a number": (2, ["llama", "--seed", "x"], ["--seed x: a whole number is meant"]),
    "an unknown option": (2, ["llama", "--kep", "1"], ["--kep"]),
    "no model at all": (2, [], ["MODEL"]),
    "a folder that is not there": (1, ["./nowhere"], ["nowhere", "does not exist"]),
    "pickled weights": (1, ["pickled", "--method", "svd"], ["pickled", "pytorch_model.bin", "safetensors"]),
    "no tokenizer": (1, ["mute"], ["mute has no tokenizer", "tokenizer.json", "--method svd"]),
    "an image model": (1, ["vit"], ["no tokenizer", "model-ready batches"]),
    "already factored": (1, ["llama-60"], ["llama-60", "already factored", "eckart export"]),
    "a bad column": (1, ["bert", "--data", "rows.csv", "--data-column", "txt"], ["rows.csv", "txt", "sentence"]),
    "data that are not there": (1, ["llama", "--data", "gone.txt"], ["gone.txt", "no such file"]),
    "too small a fraction": (2, ["llama", "--method", "svd", "--keep", "0.001"], ["--keep 0.001", "raise --keep"]),
    "a pattern without a match": (2, ["llama", "--method", "svd", "--targets", "q_prj"], ["'q_prj'", "q_proj"]),
    "a plan that is not there": (2, ["llama", "--plan", "gone.json", "--method", "svd"], ["gone.json"]),
    "labels for a causal model": (2, ["llama", "--data", "rows.csv", "--data-label-column", "label"], ["label"]),
    "a way of working that there is not": (2, ["llama", "--stream", "sometimes"], ["stream", "sometimes", "auto"]),
    "less than no memory": (2, ["llama", "--cache-memory", "-1"], ["--cache-memory -1: a number of at least 0"]),
    "a former flag": (2, ["llama", "--share", "2"], ["'share' is now called", "(--layers-per-basis 2)"]),
    "a former value": (2, ["llama", "--embeddings", "keep"], ["is now called 'dense'", "(--embeddings dense)"]),
    "a former key in a run file": (2, ["--config", "former.yaml"], ["former.yaml", "layers_per_basis: 3"]),
    "a run file that is not there": (2, ["--config", "gone.yaml"], ["gone.yaml"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_compress_refuses_with_place_and_remedy(case, cli, folder, published, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "typo.yaml").write_text("model: llama\nkep: 0.5\n")
    (folder / "former.yaml").write_text("model: llama\nshare: 3\n")
    if case == "an image model" and not (folder / "vit").exists():
        vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
                        patch_size=4)  # fmt: skip
        ViTForImageClassification(vit).save_pretrained(folder / "vit")
    if case == "pickled weights" and not (folder / "pickled").exists():
        (folder / "pickled").mkdir()
        (folder / "pickled/config.json").write_bytes((folder / "llama/config.json").read_bytes())
        (folder / "pickled/pytorch_model.bin").write_bytes(b"\x80\x04.")
    code, words, expected = REFUSALS[case]
    text = cli("compress", *words, "--output-dir", tmp_path / "out", code=code)
    message = " ".join(text.split())
    for part in expected:
        assert part in message
    assert os.listdir(tmp_path) == []


def test_data_that_are_not_there_are_refused_before_a_model_is_opened(cli, folder, published, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    for place in ("compression.open_run.find_checkpoint", "recovery.pipeline.open_student"):
        monkeypatch.setattr(f"eckart.{place}", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr("eckart.evaluation.pipeline.open_model", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr("eckart.compression.compare.open_in_memory", lambda *_, **__: pytest.fail("opened"))
    (folder / "odd.pdf").touch()
    out = ("--output-dir", tmp_path / "out")
    for data, said in (
        ("gone.txt", "gone.txt: no such file"),
        ("./gone", "no such file"),
        ("odd.pdf", "unknown suffix"),
    ):
        assert said in cli("compress", "llama", "--data", data, *out, code=1)
        assert said in cli("eval", published, "--data", data, code=1)
        assert said in cli("compare", "llama", "--methods", "svd", "--keep", "0.5", "--data", data, code=1)
        assert said in cli("tune", published, "--recovery", "lora", "--data", data, *out, code=1)
    words = ("tune", published, "--recovery", "lora", "--data", "text.txt")
    assert "no such file" in cli(*words, "--eval-data", "gone.txt", *out, code=1)
    require_data(None, "stdlib", "self", "org/data", "data", ["a text"], "text.txt", folder)


def test_compress_without_network_names_data_that_need_none(cli, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: raises(ConnectionError("no")))
    text = cli("compress", folder / "llama", "--output-dir", tmp_path / "out", code=1)
    assert "--data self" in text
    assert "--data FILE" in text
    assert "ConnectionError" not in text
    assert "did you mean" not in text
    monkeypatch.chdir(folder)
    for name in ("texts", "text"):  # the second is also a format of the datasets library
        text = cli("compress", "llama", "--data", name, "--output-dir", tmp_path / "out", code=1)
        assert "did you mean --data text.txt?" in text


def test_compress_checks_the_output_before_it_loads_the_model(cli, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("eckart.checkpoint.open.load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "there").mkdir()
    text = cli("compress", folder / "llama", "--output-dir", tmp_path / "there", code=1)
    assert f"{tmp_path / 'there'} is there already" in text
    assert "--overwrite" in text
    assert "is an input" in cli("compress", folder / "llama", "--output-dir", folder / "llama", "--overwrite", code=1)
    text = cli("compress", folder / "llama", code=2)
    assert "--output-dir DIR" in text


def test_overwrite_replaces_a_published_folder(cli, folder, tmp_path):
    for keep in (0.9, 0.5):
        cli(
            "compress",
            folder / "llama",
            "--method",
            "svd",
            "--keep",
            keep,
            "--overwrite",
            "--output-dir",
            tmp_path / "o",
        )
    assert yaml.safe_load((tmp_path / "o/eckart/recipe.yaml").read_text())["keep"] == 0.5
    assert os.listdir(tmp_path) == ["o"]


def test_method_without_data_needs_no_tokenizer(cli, folder, tmp_path):
    cli("compress", folder / "mute", "--method", "svd", "--dtype", "float32", "--output-dir", tmp_path / "out")
    assert eckart.load(tmp_path / "out").dtype == torch.float32


def test_compress_and_eval_a_sentence_transformers_folder(cli, folder, tmp_path):
    source = tmp_path / "sentence"
    inner = source / "0_Transformer"
    inner.mkdir(parents=True)
    for path in (folder / "bert").iterdir():
        (inner / path.name).write_bytes(path.read_bytes())
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling/config.json").write_text('{"embedding_dimension": 32, "pooling_mode": "mean"}')
    kinds = [
        ("0_Transformer", "base.modules.transformer.Transformer"),
        ("1_Pooling", "sentence_transformer.modules.pooling.Pooling"),
    ]
    (source / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]))  # fmt: skip
    text = cli(
        "compress", source, "--keep", 0.6, "--data", folder / "text.txt", *SMALL, "--output-dir", tmp_path / "out"
    )
    assert f'SentenceTransformer("{tmp_path / "out"}")' in text
    assert (tmp_path / "out/0_Transformer/model.safetensors").is_file()
    notes = json.loads((tmp_path / "out/eckart/report.json").read_text())["notes"]
    told = [note for note in notes if "pooler.dense" in note]  # its mean of tokens reads no pooler
    assert len(told) == 1
    assert "does not depend on it" in told[0]
    assert "Leave it out: --ignore pooler.dense" in told[0]
    assert "more text" not in told[0]
    text = cli("eval", tmp_path / "out", "--against", source, "--data", folder / "rows.csv",
               "--data-column", "sentence", "--data-target-column", "other",
               "--data-label-column", "label")  # fmt: skip
    assert "Spearman" in text


@pytest.mark.parametrize(
    "moment",
    [
        "eckart.compression.prepare.load_data",
        "eckart.checkpoint.save._verify",
    ],
)
def test_interrupt_publishes_nothing(moment, cli, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(moment, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    text = cli("compress", folder / "llama", "--data", folder / "text.txt", *SMALL, "--output-dir", tmp_path / "out",
               code=130)  # fmt: skip
    assert "interrupted; nothing was published" in text
    assert os.listdir(tmp_path) == []


def test_out_of_memory_names_what_to_lower(cli, folder, tmp_path, monkeypatch):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        monkeypatch.setattr("eckart.compression.prepare.load_data", lambda *_, error=error, **__: raises(error))
        text = cli("compress", folder / "llama", "--data", folder / "text.txt", "--output-dir", tmp_path / "o", code=1)
        assert "out of memory" in text
        assert "Lower --batch-size" in text


# -- the other commands ------------------------------------------------------------------------------


def test_eval_scores_a_causal_model_beside_its_original(cli, folder, published, tmp_path):
    text = cli("eval", published, "--against", folder / "llama", "--data", folder / "held.txt", "--max-seq-length", 32,
               "--max-tokens", 400, "--json", tmp_path / "eval.json")  # fmt: skip
    for words in ("windows of 32 tokens", "original", "eckart", "difference", "int8", "int4", "bits per byte"):
        assert words in text
    found = json.loads((tmp_path / "eval.json").read_text())
    assert set(found["scores"]["perplexity"]) == {"original", "eckart", "int8", "int4", "eckart int8"}
    assert set(found["scores"]["KL to the original (nats)"]) == {"eckart", "int8", "int4", "eckart int8"}
    size = found["sizes"]["bytes"]
    assert size["int4"] < size["int8"] < size["original"]
    assert size["eckart"] < size["original"]
    alone = cli("eval", published, "--data", folder / "text.txt", "--max-seq-length", 32)
    assert "original" not in alone.replace("of this model", "")
    assert "calibrated on" in alone


def test_eval_scores_classifier_and_embeddings(cli, folder, tmp_path):
    columns = ("--data", folder / "rows.csv", "--data-column", "sentence", "--data-label-column", "label")
    text = cli("eval", folder / "classifier", *columns)
    assert all(name in text for name in ("accuracy", "F1", "Matthews"))
    text = cli("eval", folder / "bert", *columns, "--data-target-column", "other")
    assert "Spearman" in text
    cli("compress", folder / "bert", "--method", "svd", "--output-dir", tmp_path / "out")
    text = cli("eval", tmp_path / "out", "--against", folder / "bert", "--data", folder / "held.txt", "--no-baselines")
    assert "1 - cosine to the original" in text
    assert "int8" not in text


def test_eval_refuses_what_does_not_fit(cli, folder, published):
    assert "--against MODEL" in cli("eval", folder / "bert", "--data", folder / "held.txt", code=2)
    assert "agreement" in cli("eval", published, "--task", "agremeent", code=2)
    assert "BertModel" in cli("eval", published, "--against", folder / "bert", "--data", folder / "held.txt", code=2)
    assert "own text" in cli("eval", published, "--data", "self", code=2)
    said = cli("eval", folder / "bert", "--data", folder / "held.txt", "--task", "similarity", code=1)
    assert "--task similarity needs pairs of sentences with a gold score each" in said
    assert "('text')" in said
    assert "Plain text needs no --task" in said
    said = cli("eval", folder / "classifier", "--data", folder / "held.txt", code=1)
    assert "--task classification needs texts with a class each" in said
    assert "gone" in cli("eval", published, "--data", folder / "held.txt", "--json", folder / "gone/e.json", code=2)


def test_inspect_shows_sites_groups_and_what_stays_dense(cli, folder, published, tmp_path):
    text = cli("inspect", folder / "llama", "--ignore", "down_proj", "--json", tmp_path / "i.json")
    assert "self_attn.q_proj = self_attn.k_proj = self_attn.v_proj" in text
    assert "named by --ignore" in text
    found = json.loads((tmp_path / "i.json").read_text())
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / "llama").parameters())
    assert sum(found["parameters"].values()) == numbers
    for row in found["kinds"]:
        assert 1 <= row["effective_rank"] <= min(row["shape"])
    assert f"eckart report {published}" in cli("inspect", published, code=1)


def test_methods_lists_every_method_with_its_paper(cli):
    text = cli("methods")
    for name, method in METHODS.items():
        assert name in text
        assert method.paper.split()[0] in text
    for name, embedding in EMBEDDINGS.items():
        assert name in text
        assert embedding.paper.split()[0] in text
    for name, recovery in RECOVERIES.items():
        assert name in text
        assert recovery.paper.split()[0] in text if recovery.paper else True


def test_compare_measures_every_method_at_every_size(cli, folder, tmp_path):
    text = cli("compare", folder / "llama", "--methods", "svd,drone", "--keep", "0.9,0.5", "--data",
               folder / "text.txt", *SMALL, "--json", tmp_path / "c.json")  # fmt: skip
    assert "KL to the" in text
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [(row["method"], row["keep"]) for row in rows] == [
        (name, keep) for name in ("svd", "drone") for keep in (0.9, 0.5)
    ]
    for row in rows:
        assert row["of_sites"] <= row["keep"]
        assert row["quality"]["KL to the original"] >= 0
    text = cli("compare", folder / "llama", "--methods", "svd", "--keep", "0.9;0.5", code=2)
    assert "0.9,0.7,0.5" in text
    assert "Did you mean" in cli("compare", folder / "llama", "--methods", "svdd", "--keep", "0.9", code=2)
    assert "give --keep 0.6" in cli("compare", folder / "llama", "--methods", "svd", "--keep", "0.9,60", code=2)


@pytest.fixture(scope="module")
def fresh_process(folder, published) -> dict:
    """What a fresh process, which imports transformers before eckart, finds in an export and in the folder it is of."""
    with pytest.raises(SystemExit) as left:
        app(["export", str(published), "--output-dir", str(folder / "dense")])
    assert not left.value.code
    code = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
dense, factored, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(dense)
inputs = tokenizer("the cat runs", return_tensors="pt")
found = {"dense": AutoModelForCausalLM.from_pretrained(dense)(**inputs).logits.double().abs().sum().item()}
found["eckart"] = "eckart" in sys.modules
import eckart
found["factored"] = AutoModelForCausalLM.from_pretrained(factored)(**inputs).logits.double().abs().sum().item()
model = AutoModelForCausalLM.from_pretrained(dense)
eckart.compress(model, tokenizer, data=text, keep=0.5, num_samples=8, max_seq_length=16)
heavy = ("datasets", "pandas", "peft", "sklearn", "transformers.trainer")
found["loaded"] = [name for name in heavy if name in sys.modules]
print(json.dumps(found))
"""
    return json.loads(fresh(code, folder / "dense", published, folder / "text.txt").splitlines()[-1])


def test_export_loads_without_eckart_and_its_source_with_it(cli, folder, published, fresh_process, tmp_path):
    factored = AutoModelForCausalLM.from_pretrained(published)
    inputs = AutoTokenizer.from_pretrained(published)("the cat runs", return_tensors="pt")
    here = factored(**inputs).logits.double().abs().sum().item()
    assert not fresh_process["eckart"]
    assert fresh_process["factored"] == pytest.approx(here, rel=1e-6)
    assert fresh_process["dense"] == pytest.approx(here, rel=0.05)
    assert "no factored weight" in cli("export", folder / "llama", "--output-dir", tmp_path / "no", code=1)
    assert "dense" in cli("export", published, "--format", "gguf", "--output-dir", tmp_path / "no", code=2)
    assert "already" in cli("export", published, "--output-dir", folder / "dense", code=1)


def test_compress_of_a_text_file_needs_neither_datasets_nor_trainer(fresh_process):
    assert fresh_process["loaded"] == []


def test_every_help_has_an_example_and_all_options(cli):
    assert eckart.__version__ in cli("--version")
    opens_no_model = ("methods", "demo")
    for name in ("compress", "tune", "eval", "inspect", "compare", "export", *opens_no_model):
        text = cli(name, "--help")
        assert f"Example: eckart {'compress' if name == 'methods' else name}" in " ".join(text.split())
        assert name in opens_no_model or "--trust-remote-code" in text, name
        assert "--share" not in text  # former names are refused, not shown
        for field in Recipe.model_fields if name == "compress" else ():
            assert field == "model" or f"--{field.replace('_', '-')}" in text, field


def test_help_begins_with_the_options_that_are_used_most(cli):
    for name, used in (
        ("compress", ["--keep", "--data", "--method", "--effort", "--output-dir"]),
        ("tune", ["--recovery", "--teacher", "--task", "--data", "--output-dir"]),
    ):
        most = cli(name, "--help").partition("Most used")[2].partition("╰")[0]
        assert [line.split()[1] for line in most.splitlines() if line.startswith("│ --")] == used


def test_compress_warns_of_tensors_that_the_model_does_not_use(cli, folder, tmp_path):
    model = BertModel.from_pretrained(folder / "bert")
    model.register_module("old_head", torch.nn.Linear(32, 4))
    model.save_pretrained(tmp_path / "source")
    text = cli("compress", tmp_path / "source", "--method", "svd", "--output-dir", tmp_path / "out")
    assert "does not use 2 tensors: old_head" in text


def test_compress_and_evaluate_from_python(folder, tmp_path):
    recipe = Recipe(model=str(folder / "llama"), method="drone", data=str(folder / "text.txt"), num_samples=16,
                    max_seq_length=32)  # fmt: skip
    result = eckart.compress(recipe=recipe, output_dir=tmp_path / "out")
    published = result.folder
    assert published == tmp_path / "out"
    found = eckart.evaluate(
        published, folder / "llama", data=str(folder / "held.txt"), max_seq_length=32, baselines=False
    )
    assert found["scores"]["perplexity"]["eckart"] > 1
    # The type in which numbers are stored rounds the weights alone: what is loaded computes the same.
    ids = torch.arange(6, 20)[None]
    with torch.no_grad():
        assert torch.equal(result.model(ids).logits, eckart.load(published)(ids).logits)
