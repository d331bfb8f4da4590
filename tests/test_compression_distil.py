"""All blocks of a smaller model trained together: what is trained, what it brings, and where it is left out."""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME
from test_calibration_backward import without_backward
from test_compression_refine import SMALL, TEXTS
from tiny import DEMO, Workdir, llama, place, text
from torch import Tensor
from transformers import AutoTokenizer

import eckart
from eckart.compression import distil, refine
from eckart.compression.distil import outside
from eckart.compression.refine_blocks import put_values
from eckart.errors import UsageError
from eckart.model import factored_modules

DISTIL: dict[str, Any] = {"method": "drone", "keep": 0.5, **SMALL}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REFINED", "DISTILLED"):
        monkeypatch.setattr(f"eckart.compression.prepare.{name}", 1)
    for module in (distil, refine):
        monkeypatch.setattr(module, "TRAINING", replace(module.TRAINING, epochs=2))


def divergence(model: Any, smaller: Any, batches: list[Any]) -> float:
    """Mean KL of the predictions of real tokens."""
    with torch.no_grad():
        true, found = (torch.cat([m(**b).logits for b in batches]).log_softmax(-1) for m in (model, smaller))
    return float((true.exp() * (true - found)).sum(-1).mean())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_blocks_and_nothing_else_are_trained_to_predict_what_the_original_does(
    model: Any, tokenizer: Any, dtype: str
):
    batches = [
        {"input_ids": torch.randint(0, 90, (8, 12), generator=torch.Generator().manual_seed(i))} for i in range(30)
    ]
    how: dict[str, Any] = {"data": batches, "method": "drone", "keep": 0.4, "dtype": dtype}
    told: list[str] = []
    one, other = (eckart.compress(model, distil=d, report_progress=told.append, **how) for d in (False, True))
    stages = {row["stage"]: (row["distance"], row["kept"]) for row in other.report["stages"]}
    assert list(stages) == ["factors", "distillation"]
    assert stages["distillation"][0] < stages["factors"][0]
    assert other.report["quality"]["agreement"]["kl"] == stages["distillation"][0]
    assert "distillation" in other.report["seconds"]
    assert any("all blocks together, 2 passes of " in line for line in told)
    unseen = [{"input_ids": torch.randint(0, 90, (32, 12), generator=torch.Generator().manual_seed(99))}]
    before, after = (divergence(model, result.model.float(), unseen) for result in (one, other))
    assert after < 0.99 * before
    theirs, changed = one.model.state_dict(), set()
    for name, value in other.model.state_dict().items():
        if not torch.equal(value, theirs[name]):
            changed.add(name.split(".layers.")[-1].split(".")[0])
    assert changed == {"0", "1"}


def test_the_stored_type_and_shared_parameters_stay(tokenizer: Any):
    model = llama(num_hidden_layers=2)
    result = eckart.compress(
        model, tokenizer, data=TEXTS, distil=True, **DISTIL | {"method": "basis-sharing"}, dtype="bfloat16"
    )
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    names = [name for name, _ in result.model.named_parameters()]
    assert len(names) < len([name for name, _ in result.model.named_parameters(remove_duplicate=False)])
    assert all(p.requires_grad for p in result.model.parameters())
    assert any(row["stage"] == "distillation" for row in result.report["stages"])


def test_what_others_hold_is_not_trained():
    model = llama(num_hidden_layers=2)
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].input_layernorm.weight = model.model.norm.weight
    frozen = outside(model, ["model.layers.0", "model.layers.1"])
    assert {"model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"} <= frozen
    assert "model.layers.0.mlp.up_proj.weight" not in frozen
    assert not [name for name in frozen if ".layers." in name and "1.input_layernorm" not in name]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"effort": "best"}, ["distillation"]),
        ({"effort": "best", "distil": False}, ["refinement"]),
        ({"effort": "best", "refine": True}, ["refinement", "distillation"]),
        ({"refine": True, "distil": True}, ["refinement", "distillation"]),
        ({"effort": "best", "distil": False, "refine": False}, []),
    ],
)
def test_the_best_effort_trains_all_blocks_together_and_both_ways_only_where_both_are_asked_for(
    options: dict[str, Any], expected: list[str], model: Any, tokenizer: Any
):
    told: list[str] = []
    result = eckart.compress(
        model, tokenizer, data=TEXTS, report_progress=told.append, **DISTIL | {"refit": False} | options
    )
    assert [row["stage"] for row in result.report.get("stages", [])] == ["factors", *expected] * bool(expected)
    said = [line.split(":")[0] for line in told if line.startswith(("refinement: ", "distillation: "))]
    assert sorted(said) == sorted(expected)
    assert not [note for note in result.report["notes"] if "left out: " in note]


@pytest.mark.parametrize(
    ("asked", "there", "read", "passes"),
    [(None, 600, 48, 2), (None, 18, 25, 3), (None, 22, 24, 3), (24, 600, 24, 3), (4, 600, 4, 18), (96, 600, 96, 1)],
)
def test_of_more_text_fewer_passes_are_made(
    asked: int | None, there: int, read: int, passes: int, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distil, "TRAINING", replace(distil.TRAINING, epochs=6))
    monkeypatch.setattr("eckart.compression.prepare.DISTILLED", 4)
    own, told, trained = distil.train_block, [], []
    texts: dict[str, Any] = {}

    def counting(parameters: Any, steps: Any, held: Any, error: Any, training: Any, *others: Any, **how: Any) -> Any:
        trained.append(training.epochs)
        return own(parameters, steps, held, error, replace(training, epochs=1), *others, **how)

    def looking(context: Any, *others: Any) -> Any:
        texts.update({name: getattr(context, name) for name in ("data", "refining", "distilling")})
        return distil_model(context, *others)

    distil_model = distil.distil_model
    monkeypatch.setattr(distil, "train_block", counting)
    monkeypatch.setattr(distil, "distil_model", looking)
    options = {**DISTIL, "data": (TEXTS * 6)[:there], "distil": True, "report_progress": told.append}
    eckart.compress(model, tokenizer, refine_samples=asked, **options)
    assert trained == [passes]
    often = f"{passes} passes of " if passes > 1 else ""
    assert re.search(rf"together, {often}\d+ steps, about", "\n".join(told))
    assert texts["distilling"].num_examples == read
    assert texts["data"].num_examples in (12, 13)
    assert texts["refining"] is None
    rows = {name: {row for batch in texts[name].batches for row in batch.examples} for name in ("data", "distilling")}
    assert asked == 4 or rows["data"] <= rows["distilling"]


def test_the_rate_follows_from_the_harm_that_noise_does(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    measured, trained = [], []
    own = distil.train_block

    def measuring(parameters: Any, held: Any, *others: Any) -> float:
        measured.append((parameters, held))
        return 0.0123

    def counting(parameters: Any, steps: Any, held: Any, error: Any, training: Any, *others: Any, **how: Any) -> Any:
        trained.append((parameters, held, training.rate, others[1]))
        return own(parameters, steps, held, error, training, *others, **how)

    monkeypatch.setattr(distil, "find_equal_noise", measuring)
    monkeypatch.setattr(distil, "train_block", counting)
    eckart.compress(model, tokenizer, data=TEXTS * 6, distil=True, **DISTIL)
    (((same, few), (parameters, held, rate, off)),) = zip(measured, trained, strict=True)
    assert same is parameters
    assert (rate, off) == (distil.TRAINING.rate, 0.0123 / model.config.num_hidden_layers ** (2 / 3))
    assert few == held[:: distil.MEASURED]


def test_a_worse_model_is_not_kept(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    before = eckart.compress(model, tokenizer, data=TEXTS, **DISTIL)

    def spoil(model: Any, block: str, values: dict[str, Tensor]) -> None:
        put_values(model, block, {name: value * 0.5 for name, value in values.items()})

    monkeypatch.setattr(distil, "put_values", spoil)
    result = eckart.compress(model, tokenizer, data=TEXTS, distil=True, **DISTIL)
    assert [(row["stage"], row["kept"]) for row in result.report["stages"]] == [
        ("factors", True),
        ("distillation", False),
    ]
    theirs = before.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in result.model.state_dict().items())
    assert any("the distillation was left out: held-out distance" in note for note in result.report["notes"])


def few(model: Any, tokenizer: Any, monkeypatch: Any) -> tuple[Any, dict[str, Any]]:
    return model, {"tokenizer": tokenizer, "data": TEXTS[:1], "num_samples": 1}


def full(model: Any, tokenizer: Any, monkeypatch: Any) -> tuple[Any, dict[str, Any]]:
    monkeypatch.setattr(distil, "free_memory", lambda device: 1000)
    return model, {"tokenizer": tokenizer, "data": TEXTS}


def encoder(model: Any, tokenizer: Any, monkeypatch: Any) -> tuple[Any, dict[str, Any]]:
    return BY_NAME["bert"].model(), {"data": BY_NAME["bert"].batches(4, 4)}


def no_blocks(model: Any, tokenizer: Any, monkeypatch: Any) -> tuple[Any, dict[str, Any]]:
    monkeypatch.setattr(distil, "all_blocks", lambda model: [])
    return model, {"tokenizer": tokenizer, "data": TEXTS}


def no_weights(model: Any, tokenizer: Any, monkeypatch: Any) -> tuple[Any, dict[str, Any]]:
    monkeypatch.setattr(distil, "all_blocks", lambda model: ["model.rotary_emb"])
    return model, {"tokenizer": tokenizer, "data": TEXTS}


@pytest.mark.parametrize(("case", "why"), [(no_blocks, "has no blocks"), (no_weights, "no weights of their own")])
def test_without_blocks_that_can_be_trained_it_is_refused(
    case: Any, why: str, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    model, options = case(model, tokenizer, monkeypatch)
    with pytest.raises(UsageError, match=f"--distil: .*{why}"):
        eckart.compress(model, distil=True, **{**DISTIL, **options})


@pytest.mark.parametrize(
    ("case", "why"),
    [(few, "too little text"), (full, "of memory, and less is free"), (encoder, "does not predict each token")],
)
def test_where_it_cannot_be_it_is_refused_or_left_out(
    case: Any, why: str, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    model, options = case(model, tokenizer, monkeypatch)
    options = {**DISTIL, **options}
    with pytest.raises(UsageError, match=f"--distil: .*{why}"):
        eckart.compress(model, distil=True, **options)
    result = eckart.compress(model, effort="best", refit=False, **options)
    assert any(note.startswith("the distillation was left out: ") and why in note for note in result.report["notes"])
    assert (case is few) == (not any("one after another instead" in note for note in result.report["notes"]))
    assert ("refinement" in [row["stage"] for row in result.report.get("stages", [])]) == (case is not few)


def test_what_fails_without_gradients_too_is_an_error(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> float:
        raise RuntimeError("of another kind")

    monkeypatch.setattr(distil, "find_equal_noise", broken)
    with pytest.raises(RuntimeError, match="of another kind"):
        eckart.compress(model, tokenizer, data=TEXTS, distil=True, **DISTIL)


def test_where_memory_runs_out_before_the_first_step_the_model_stays(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    def run_out(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(distil, "training_copies", run_out)
    result = eckart.compress(model, tokenizer, data=TEXTS, distil=True, **DISTIL)
    assert "the distillation was left out: memory ran out (OutOfMemoryError: )" in result.report["notes"]


def test_what_it_takes_counts_what_is_trained_and_what_is_held():
    model = llama()
    blocks = [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    trained = sum(p.numel() for block in blocks for p in model.get_submodule(block).parameters())
    everything = sum(p.numel() for p in model.parameters())
    logits = 4 * distil.TABLES * 1024 * model.config.vocab_size
    assert distil.memory_needed(model, blocks, 1) == 24 * trained + logits
    assert distil.memory_needed(model, blocks, 2) == 28 * trained + logits
    assert distil.memory_needed(model.bfloat16(), blocks, 1) == 24 * trained + 4 * everything + logits


def test_where_no_gradient_can_be_had_the_model_stays_and_that_is_said():
    batches = BY_NAME["llama"].batches(rows=4, count=4)
    how: dict[str, Any] = {"data": batches, "method": "asvd", "keep": 0.6}
    result, plain = (eckart.compress(without_backward(), distil=distil, **how) for distil in (True, False))
    assert any("left out: no backward pass runs through the model" in note for note in result.report["notes"])
    assert all(torch.equal(value, plain.model.state_dict()[key]) for key, value in result.model.state_dict().items())


def test_where_memory_runs_out_the_model_stays_and_that_is_said(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    def run_out(*arguments: Any, **how: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(distil, "train_block", run_out)
    result = eckart.compress(model, tokenizer, data=TEXTS, distil=True, **DISTIL)
    assert any("the distillation was left out: memory ran out" in note for note in result.report["notes"])
    assert factored_modules(result.model)


# -- processes -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_processes_give_the_result_of_one(server: Any, tmp_path: Path):
    place(llama(num_hidden_layers=2), tmp_path / "llama")
    text(tmp_path)
    workdir = Workdir(tmp_path)
    words = ("--method", "drone", "--keep", "0.5", "--distil", "--dtype", "float32", "--stream")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [server.start(workdir.words(tmp_path / "one", *words, "off"))]
    started += [
        server.start(
            workdir.words(tmp_path / "two", *words, "off"), environ={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}
        )
        for i in range(2)
    ]
    ended = [server.wait(one) for one in started]
    assert [one.code for one in ended] == [0, 0, 0], [one.said for one in ended]
    reports = [json.loads((tmp_path / name / "eckart/report.json").read_text()) for name in ("one", "two")]
    one, two = ({row["stage"]: row["distance"] for row in report["stages"]} for report in reports)
    assert two == pytest.approx(one, rel=1e-3)
    assert one["distillation"] < one["factors"]
    models = [eckart.load(tmp_path / name).state_dict() for name in ("one", "two")]
    for name, value in models[0].items():
        assert (models[1][name] - value).norm() <= 1e-2 * value.norm() + 1e-6, name
    done = server(workdir.words(tmp_path / "three", *words, "on"))
    assert done.code == 2
    assert "--distil: it needs the whole model in memory" in done.said
