"""Memory that holds fewer rows than a batch has: every step goes on with fewer, and no finished work is lost."""

from pathlib import Path

import pytest
import torch
import transformers
from architectures import BY_NAME
from tiny import llama, place, text
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama

import eckart
from eckart.cli.app import app
from eckart.errors import CheckpointError
from eckart.evaluation.agreement import compare_embeddings, compare_predictions
from eckart.evaluation.quality import score_classes
from eckart.moments import Halving, run_in_halves

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
OPTIONS = {"num_samples": 12, "max_seq_length": 32, "batch_size": 4, "keep": 0.6}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    place(llama(num_hidden_layers=2), home / "llama", torch.float32)
    text(home)
    return home


@pytest.fixture
def two_rows(monkeypatch):
    """Attention for more than two rows fails as torch's allocator on a CPU does, which has no error of its own."""
    for kind in (modeling_llama.LlamaAttention, modeling_bert.BertAttention):
        own = kind.forward

        def forward(self, *args, own=own, **named):
            hidden = named.get("hidden_states", args[0] if args else None)
            if hidden.shape[0] > 2:
                raise RuntimeError(f"{ALLOCATOR}allocate 99 bytes. Error code 12 (Cannot allocate memory)")
            return own(self, *args, **named)

        monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("stream", ["on", "off"])
def test_every_step_of_a_compression_goes_on_with_fewer_rows(stream, home, tmp_path, request, caplog):
    """Statistics, the refit, and the comparison with the original."""
    data = str(home / "text.txt")
    whole = eckart.compress(home / "llama", method="drone", refit=True, data=data, **OPTIONS)
    request.getfixturevalue("two_rows")
    halved = eckart.compress(
        home / "llama", method="drone", refit=True, data=data, latency=True, output_dir=tmp_path / "out", stream=stream,
        **OPTIONS,
    )  # fmt: skip
    assert halved.folder == tmp_path / "out"
    assert "out of memory at 4 examples: continuing with half" in caplog.text
    for name in ("kl", "tokens"):
        assert halved.report["quality"]["agreement"][name] == pytest.approx(
            whole.report["quality"]["agreement"][name], rel=1e-3
        )
    if stream == "off":  # seconds are extra: they are left out
        assert "the speed is not measured: out of memory" in caplog.text
        assert halved.report.get("latency") is None


def test_evaluation_goes_on_with_fewer_rows_and_without_seconds(home, request):
    asked = {"data": str(home / "text.txt"), "max_seq_length": 32, "batch_size": 4, "max_tokens": 512}
    whole = eckart.evaluate(home / "llama", latency=False, **asked)
    request.getfixturevalue("two_rows")
    halved = eckart.evaluate(home / "llama", **asked)
    for name, columns in whole["scores"].items():
        assert halved["scores"][name] == pytest.approx(columns, rel=1e-5)
    assert halved["latency"] is None


def test_measures_of_encoders_go_on_with_fewer_rows(request):
    bert = BY_NAME["bert"]
    model, other = (transformers.BertForMaskedLM(bert.model().config).eval() for _ in range(2))
    batches = eckart.data.load_data(bert.batches(rows=4, count=2), model=model).batches
    whole = compare_predictions(model, other, batches), compare_embeddings(model.base_model, other.base_model, batches)
    request.getfixturevalue("two_rows")
    halved = compare_predictions(model, other, batches), compare_embeddings(model.base_model, other.base_model, batches)
    for one, two in zip(whole, halved, strict=True):
        assert one.keys() == two.keys()
        words = {key for key, value in two.items() if isinstance(value, str)}
        assert all(one[key] == two[key] for key in words)
        numbers = {key: value for key, value in two.items() if key not in words}
        assert {key: one[key] for key in numbers} == pytest.approx(numbers, rel=1e-4)


def test_parts_come_in_order_and_each_row_once():
    class Rows:
        def __init__(self, examples):
            self.examples = examples

        def rows(self, start, stop):
            return Rows(self.examples[start:stop])

    def call(part):
        if len(part.examples) > 3:
            raise MemoryError
        return part.examples

    found = list(run_in_halves([Rows(list(range(10))), Rows(list(range(10, 15)))], call))
    assert [number for part in found for number in part] == list(range(15))
    with pytest.raises(MemoryError):  # not even one row
        list(
            run_in_halves([Rows([1])], lambda part: Halving().run(part, lambda _: (_ for _ in ()).throw(MemoryError())))
        )


def test_memory_that_is_never_enough_names_what_to_lower(home, tmp_path, monkeypatch, capsys):
    def never(*_, **__):
        raise RuntimeError(f"{ALLOCATOR}allocate 50331648 bytes. Error code 12 (Cannot allocate memory)")

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", never)
    with pytest.raises(SystemExit) as left:
        app(["compress", str(home / "llama"), "--data", str(home / "text.txt"), "--num-samples", "4",
             "--max-seq-length", "16", "--output-dir", str(tmp_path / "out")])  # fmt: skip
    said = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 1
    assert "out of memory" in said
    for option in ("--batch-size", "--max-seq-length", "--num-samples", "--stream on"):
        assert option in said
    assert list(tmp_path.iterdir()) == []


# -- the disk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "room", "fits"), [
    ({"keep": 0.3}, 0.6, False),  # of the sites: the embeddings, most of this model, stay
    ({"keep": 0.3, "keep_of": "sites"}, 1.1, True),
    ({"keep": 0.95, "keep_of": "model"}, 0.6, False),
])  # fmt: skip
def test_the_space_of_the_result_is_checked_before_any_work(options, room, fits, home, tmp_path, monkeypatch):
    size = sum(p.numel() * 4 for p in transformers.AutoModelForCausalLM.from_pretrained(home / "llama").parameters())
    beside = sum(path.stat().st_size for path in (home / "llama").iterdir() if path.suffix == ".json")
    usage = type("Usage", (), {"free": int(room * size) + beside})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    if fits:
        eckart.compress(home / "llama", method="svd", output_dir=tmp_path / "out", **options)
        return
    for module in ("open_run.open_model", "prepare.load_data"):
        monkeypatch.setattr(f"eckart.compression.{module}", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(CheckpointError, match=r"out needs [\d,]+ bytes and .* has [\d,]+ free"):
        eckart.compress(home / "llama", method="svd", output_dir=tmp_path / "out", **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "llama")
    with pytest.raises(CheckpointError, match=r"out needs [\d,]+ bytes and .* has [\d,]+ free"):
        eckart.compress(model, method="svd", output_dir=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_scores_of_classes_go_on_with_fewer_rows(request):
    bert = BY_NAME["bert"]
    model = transformers.BertForSequenceClassification(bert.model().config)
    batches = eckart.data.load_data(
        [{**b, "labels": torch.arange(len(b["input_ids"])) % 2} for b in bert.batches(rows=4, count=2)], model=model
    ).batches
    whole = score_classes(model, batches)
    request.getfixturevalue("two_rows")
    assert score_classes(model, batches) == whole


def test_model_with_adapters_is_refused_before_the_work(home, tmp_path, monkeypatch):
    """It cannot be published as a checkpoint of its own, which was found out after all of the work."""
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    monkeypatch.setattr("eckart.compression.pipeline.prepare", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(eckart.EckartError, match="adapters"):
        eckart.compress(model, method="svd", output_dir=tmp_path / "out")
