"""Models from which rows leave early: each gives what it gives alone, whatever stands beside it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from adaptive_models import LENGTHS, blocks_of, classifier, texts, with_exits
from torch.nn import functional

import eckart
from eckart.adaptive import adaptive_spec, attach, behaviors_of, detach
from eckart.adaptive.early_exit import HEADS, EarlyExit, set_early_exit
from eckart.adaptive.exit_rules import entropy, find_exits
from eckart.checkpoint.save import save
from eckart.errors import CheckpointError, ModelError, UsageError
from eckart.model.clone import shared_clone

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KINDS = ("Bert", "Roberta", "DistilBert", "Albert", "DebertaV2", "ModernBert", "Electra", "MPNet")


def alone(model, inputs, **more):
    """What each row gives in a batch of one, without padding."""
    found = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        length = int(mask.sum())
        one = {"input_ids": ids[None, :length], "attention_mask": mask[None, :length]}
        found.append(model(**one, **more))
    return torch.cat([out.logits for out in found]), torch.cat([out.exit_blocks for out in found])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_leave_at_several_blocks_give_what_they_give_alone(kind):
    model = with_exits(classifier(kind))
    inputs = texts(extra=3)
    found = model(**inputs)
    logits, blocks = alone(model, inputs)
    assert len(set(blocks.tolist())) > 2, blocks
    assert torch.equal(found.exit_blocks, blocks)
    torch.testing.assert_close(found.logits, logits, **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_padding_never_changes_a_decision(attention, pooling):
    model = with_exits(classifier(attention=attention), pooling=pooling)
    logits, blocks = alone(model, texts())
    assert len(set(blocks.tolist())) > 2, blocks
    for extra in (0, 1, 11):
        found = model(**texts(extra=extra))
        assert torch.equal(found.exit_blocks, blocks)
        torch.testing.assert_close(found.logits, logits, **CLOSE)


def test_a_threshold_of_0_gives_the_numbers_of_the_model_itself():
    dense = classifier()
    model = with_exits(copy.deepcopy(dense), threshold=0.0)
    found = model(**texts())
    assert torch.equal(found.logits, dense(**texts()).logits)
    assert found.exit_blocks.tolist() == [4] * len(LENGTHS)


def test_blocks_run_on_the_rows_that_are_left_and_not_at_all_when_all_have_left():
    model = with_exits(classifier())
    rows = []
    for name in blocks_of(model):
        attention = model.get_submodule(f"{name}.attention.self.query")
        attention.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    blocks = model(**texts()).exit_blocks
    assert rows == [int((blocks >= block).sum()) for block in range(1, 5)][: len(rows)]
    assert len(set(rows)) > 1
    rows.clear()
    found = model(**texts(), exit_threshold=10.0)
    assert rows == [len(LENGTHS)]
    assert found.exit_blocks.tolist() == [1] * len(LENGTHS)
    assert torch.isfinite(found.logits).all()


def test_the_answer_is_that_of_the_head_at_which_a_row_leaves():
    model = with_exits(classifier())
    inputs = texts()
    found = model(**inputs)
    states = model(**inputs, output_hidden_states=True).hidden_states  # the whole model runs
    for row, block in enumerate(found.exit_blocks.tolist()):
        for number in range(min(block, 3)):
            answer = getattr(model, HEADS)[str(number + 1)](states[number + 1][:, 0])[row]
            assert (float(entropy(answer[None], "single_label_classification")) < 0.4) == (number + 1 == block)
            if number + 1 == block:
                torch.testing.assert_close(found.logits[row], answer, **CLOSE)


def test_the_whole_model_runs_in_training_and_where_its_inside_is_asked_for():
    dense = classifier()
    model = with_exits(copy.deepcopy(dense), threshold=10.0)
    expected = dense(**texts()).logits
    for more in ({"output_hidden_states": True}, {"output_attentions": True}):
        found = model(**texts(), **more)
        torch.testing.assert_close(found.logits, expected, **CLOSE)
        assert not hasattr(found, "exit_blocks")
    assert len(model(**texts(), output_hidden_states=True).hidden_states) == 5
    assert not hasattr(model.train()(**texts()), "exit_blocks")
    assert not torch.allclose(model.eval()(**texts()).logits, expected)


@pytest.mark.parametrize(
    ("options", "problem", "labels"),
    [({"num_labels": 3}, "single_label_classification", torch.tensor([0, 2, 1, 1, 0])),
     ({"num_labels": 3}, "multi_label_classification", torch.randint(0, 2, (5, 3)).float()),
     ({"num_labels": 1}, "regression", torch.tensor([0.5, 1.0, 2.0, -1.0, 0.0]))],
)  # fmt: skip
def test_losses_are_of_the_answers_that_are_given(options, problem, labels):
    how = {"rule": "patience", "threshold": 1, "tolerance": 2.0} if problem == "regression" else {"threshold": 0.4}
    model = with_exits(classifier(problem_type=problem, **options), problem=problem, **how)
    found = model(**texts(), labels=labels)
    logits, blocks = alone(model, texts())
    assert int((blocks < 4).sum()) > 0, blocks
    torch.testing.assert_close(found.logits, logits, **CLOSE)
    loss = {
        "single_label_classification": lambda: functional.cross_entropy(logits, labels),
        "multi_label_classification": lambda: functional.binary_cross_entropy_with_logits(logits, labels),
        "regression": lambda: functional.mse_loss(logits.squeeze(), labels),
    }[problem]()
    torch.testing.assert_close(found.loss, loss, **CLOSE)
    as_tuple = model(**texts(), labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], loss, **CLOSE)
    torch.testing.assert_close(as_tuple[1], logits, **CLOSE)


def test_patience_leaves_once_answers_stay_the_same():
    model = with_exits(classifier(layers=6), exits=(1, 2, 3, 4, 5), rule="patience", threshold=2)
    found = model(**texts())
    states = model(**texts(), output_hidden_states=True).hidden_states
    answers = torch.stack(
        [head(state[:, 0]) for head, state in zip(getattr(model, HEADS).values(), states[1:6], strict=True)]
    )
    for row, block in enumerate(found.exit_blocks.tolist()):
        same, expected = 0, 6
        for place in range(1, 5):
            same = same + 1 if answers[place, row].argmax() == answers[place - 1, row].argmax() else 0
            if same == 2:
                expected = place + 1
                break
        assert block == expected
    exits = find_exits(list(answers), rule="patience", threshold=2, problem="single_label_classification")
    assert torch.where(exits < 5, exits + 1, 6).tolist() == found.exit_blocks.tolist()
    assert len(set(found.exit_blocks.tolist())) > 1


def test_copies_behave_the_same_and_are_their_own():
    model = with_exits(classifier())
    before = model(**texts())
    for copied in (copy.deepcopy(model), shared_clone(model)):
        assert torch.equal(copied(**texts()).logits, before.logits)
        set_early_exit(copied, threshold=10.0)
        assert copied(**texts()).exit_blocks.tolist() == [1] * 5
        assert torch.equal(model(**texts()).exit_blocks, before.exit_blocks)
    assert len(behaviors_of(model)) == 1


def test_detaching_leaves_the_model_as_it_was():
    dense = classifier()
    model = with_exits(copy.deepcopy(dense), threshold=10.0)
    detach(model)
    assert adaptive_spec(model) is None
    assert model.state_dict().keys() == dense.state_dict().keys()
    found = model(**texts())
    assert torch.equal(found.logits, dense(**texts()).logits)
    assert not hasattr(found, "exit_blocks")
    assert not model._forward_pre_hooks
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_error_inside_leaves_nothing_behind():
    model = with_exits(classifier())
    handle = model.bert.encoder.layer[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**texts(), exit_threshold=0.0)
    handle.remove()
    hidden = torch.randn(2, 3, 16)
    assert model.bert.encoder.layer[0](hidden).shape == hidden.shape  # no pass is under way
    assert model(**texts()).exit_blocks.tolist() == alone(model, texts())[1].tolist()


@pytest.mark.parametrize("kind", ["Bert", "ModernBert"])
def test_a_dense_model_is_saved_and_loaded_with_its_exits(kind, tmp_path):
    model = with_exits(classifier(kind))
    save(model, tmp_path / "saved", verify=True)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 4
    assert config["adaptive"] == adaptive_spec(model)
    expected = model(**texts())
    for load in (eckart.load, transformers.AutoModelForSequenceClassification.from_pretrained):
        loaded = load(tmp_path / "saved")
        assert type(loaded) is type(model)
        found = loaded(**texts())
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.exit_blocks, expected.exit_blocks)
    set_early_exit(loaded, threshold=0.0)
    loaded.save_pretrained(tmp_path / "again")
    assert eckart.load(tmp_path / "again")(**texts()).exit_blocks.tolist() == [4] * 5
    bare = transformers.AutoModel.from_pretrained(tmp_path / "saved")
    assert not behaviors_of(bare)


def test_a_head_without_its_numbers_is_refused(tmp_path):
    model = with_exits(classifier())
    save(model, tmp_path / "saved")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    del tensors["exit_heads.2.out.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    for load in (eckart.load, transformers.AutoModelForSequenceClassification.from_pretrained):
        with pytest.raises(CheckpointError, match=r"exit_heads\.2\.out\.weight"):
            load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"behaviors": {"late-exit": {}}}, "late-exit.*not known"), ({"blocks": []}, "not in eckart's format 4: adaptive"),
     ({"behaviors": {"early-exit": {"exits": [2, 1]}}}, "early-exit"),
     ({"blocks": ["bert.encoder.layer.0"]}, "early-exit, but it has 1 blocks")],
)  # fmt: skip
def test_a_description_that_cannot_be_is_refused(change, words, tmp_path):
    model = with_exits(classifier())
    save(model, tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"]["adaptive"] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words):
        eckart.load(tmp_path / "saved")


def test_values_that_cannot_be_are_refused():
    model = with_exits(classifier())
    for wrong in ({"threshold": -1.0}, {"threshold": float("nan")}, {"rule": "patience"}, {"tolerance": 0.5},
                  {"rule": "luck", "threshold": 1}, {"rule": "patience", "threshold": 1.5}):  # fmt: skip
        with pytest.raises(UsageError):
            set_early_exit(model, **wrong)
    with pytest.raises(UsageError, match="exit_threshold"):
        model(**texts(), exit_threshold="low")
    assert behaviors_of(model)["early-exit"].threshold == 0.4
    with pytest.raises(ModelError, match="--recovery early-exit"):
        set_early_exit(classifier(), threshold=0.1)
    bare = transformers.BertModel(model.config)
    with pytest.raises(ModelError, match="no head"):
        attach(bare, EarlyExit.from_spec(behaviors_of(model)["early-exit"].spec()), ["encoder.layer.0"] * 4)
    with pytest.raises(ModelError, match="last exit is after block 3"):
        attach(classifier(layers=2), behaviors_of(model)["early-exit"], blocks_of(classifier(layers=2)))
