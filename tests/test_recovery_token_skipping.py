"""Token skipping as a recovery: what it tries, what the masks learn, and that training masks what inference removes."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from adaptive_models import blocks_of, classifier, texts
from architectures import scaled
from torch import nn
from tuning_problem import QUICK, accuracy, batch, bert, bert_config, gpt2, reader, train, tuning_folders

import eckart
from eckart.adaptive import attach, behaviors_of, detach
from eckart.adaptive.token_skipping import TokenSkipping
from eckart.errors import ModelError, UsageError
from eckart.evaluation.sizes import measure_multiply_adds
from eckart.forms.transformers_internals import attention_of
from eckart.linalg import relative
from eckart.recovery import make_recovery
from eckart.recovery.skipping.costs import BlockCost
from eckart.recovery.skipping.training import POINTS, SkipTraining
from eckart.recovery.skipping.trial import SkippingPlaces, find_places
from eckart.recovery.token_skipping import TokenSkippingRecovery

RULES = ("power-bert", "ltp")


def deep(**options):
    """The tiny classifier with four blocks."""
    return scaled(bert(num_hidden_layers=4, **options))


@pytest.mark.parametrize(("kind", "attention"), [
    ("Bert", "attention.self"), ("DistilBert", "attention"), ("ModernBert", "attn"), ("MPNet", "change"),
])  # fmt: skip
def test_a_trial_finds_blocks_and_attention_and_leaves_the_model_as_it_was(kind, attention):
    model = classifier(kind)
    before, own = model(**texts()).logits, model.config._attn_implementation
    places = find_places(model)
    assert places.blocks == blocks_of(model)
    assert places.attention == attention
    assert places.error < 1e-5
    assert model.config._attn_implementation == own
    assert not behaviors_of(model)
    assert torch.equal(model(**texts()).logits, before)


def test_what_cannot_skip_is_refused_by_name():
    with pytest.raises(ModelError, match=r"token-skipping: tokens cannot leave .* DebertaV2ForSequenceClassification"):
        find_places(classifier("DebertaV2"))
    with pytest.raises(ModelError, match="GPT2ForSequenceClassification reads its text from left to right"):
        find_places(gpt2())
    with pytest.raises(ModelError, match="positions for 8 tokens"):
        find_places(bert(max_position_embeddings=8))

    class Mean(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden, *rest, **more):
            # Reads padding: what has left changes it.
            return self.layer(hidden + hidden.mean(1, keepdim=True), *rest, **more)

    model = deep()
    model.bert.encoder.layer[2] = Mean(model.bert.encoder.layer[2])
    with pytest.raises(ModelError, match="of the largest apart when tokens leave"):
        find_places(model)


@pytest.mark.parametrize("rule", [("power-bert", (0.7, 0.4, 0.4)), ("ltp", (0.7, 0.9, 1.0))], ids=RULES)
@pytest.mark.parametrize("kind", ["Bert", "ModernBert", "MPNet"])
def test_masks_in_training_give_what_taking_tokens_out_gives(kind, rule):
    model = classifier(kind)
    places = find_places(model)
    model.set_attn_implementation("eager")
    masks = SkipTraining(rule[0], places, ("first",), 1.0)
    masks.install(model, places)
    masks.levels = list(rule[1])
    given = {**texts(), "labels": torch.tensor([0, 1, 0, 1, 1])}
    states = []
    watch = model.base_model.register_forward_hook(lambda _, args, output: states.append(output[0]))
    trained = model(**given).logits
    reads = masks.kept
    equal = model(texts((6, 6, 6))["input_ids"]).logits
    masks.uninstall(model)
    watch.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not hasattr(model, "eckart_token_skipping")
    counts = []

    class Counting(TokenSkipping):
        def before_block(self, walk, args, kwargs):
            counts.append(walk.real.sum(1))
            return super().before_block(walk, args, kwargs)

    attach(model, Counting(*rule, places.attention), places.blocks)
    model.base_model.register_forward_hook(lambda _, args, output: states.append(output[0]))
    torch.testing.assert_close(model(**texts()).logits, trained, atol=2e-6, rtol=1e-4)
    real = texts()["attention_mask"].bool()
    torch.testing.assert_close(states[-1][real], states[0][real], atol=1e-5, rtol=1e-4)  # of tokens that left, too
    assert torch.equal(torch.stack(counts, 1), reads)
    torch.testing.assert_close(model(texts((6, 6, 6))["input_ids"]).logits, equal, atol=2e-6, rtol=1e-4)


def test_soft_masks_multiply_what_blocks_put_out():
    model = classifier(layers=3, attention="eager")
    states = model(**texts(), output_hidden_states=True, output_attentions=True)
    places = SkippingPlaces(blocks_of(model), "attention.self", 0.0)
    masks = SkipTraining("power-bert", places, ("first",), 1.0)
    masks.install(model, places)
    assert torch.equal(model(**texts()).logits, states.logits)  # at first everything is kept
    with torch.no_grad():
        masks.moved[0] = torch.linspace(0, 0.9, POINTS)
    seen = []
    model.get_submodule(places.blocks[1]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**texts())
    real = texts()["attention_mask"].bool()
    received = (states.attentions[0].sum(1) * real[:, :, None]).sum(1)
    for row in range(len(real)):
        length = int(real[row].sum())
        order = sorted(range(length), key=lambda token: -received[row, token])
        for token in range(length):
            place = int((order.index(token) + 0.5) * POINTS / length)
            factor = 1.0 if token == 0 else 1 - 0.9 * place / (POINTS - 1)
            expected = states.hidden_states[1][row, token] * factor
            torch.testing.assert_close(seen[0][row, token], expected, atol=1e-5, rtol=1e-4)


def test_the_penalty_of_power_bert_weighs_later_blocks_more():
    places = SkippingPlaces(("a", "b", "c"), "attention.self", 0.0)
    masks = SkipTraining("power-bert", places, ("first",), 2.0)
    assert masks.penalty().item() == 1
    masks.penalty().backward()
    first, second = (float(row.sum()) for row in masks.moved.grad)
    assert second == pytest.approx(2 * first)
    assert first == pytest.approx(-2 / 3)
    with torch.no_grad():
        masks.moved += 7
        masks.moved[0, 0] = -1
    masks.project()
    assert masks.moved.min() == 0
    assert masks.moved.max() == 0.5
    assert masks.learned() == pytest.approx([1 / POINTS, 0])


def test_ltp_learns_thresholds_through_sigmoids():
    model = classifier(layers=3, attention="eager")
    places = SkippingPlaces(blocks_of(model), "attention.self", 0.0)
    masks = SkipTraining("ltp", places, ("first",), 1.0)
    masks.install(model, places)
    output = model(**texts(), output_attentions=True)
    real = texts()["attention_mask"].bool()
    expected = []
    for maps, threshold in zip(output.attentions[:2], (0.25, 0.5), strict=True):
        scores = relative((maps.sum(1) * real[:, :, None]).sum(1) * real, real)
        mask = torch.sigmoid((scores - threshold) / 0.1)
        mask[:, 0] = 1
        expected.append(mask[real].mean())
    assert masks.penalty().item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    (output.logits.sum() + masks.penalty()).backward()
    assert (masks.moved.grad != 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_it_learns_reaches_the_speedup_and_says_so(rule):
    teacher = train(bert(num_hidden_layers=4), make_recovery("full"), 60)
    assert accuracy(teacher) > 0.9
    model = bert(num_hidden_layers=4)
    model.load_state_dict(teacher.state_dict())
    recovery = TokenSkippingRecovery(rule=rule, speedup=1.6, temperature=2.0)
    prepare_model_with(recovery, model, teacher, 40)
    before = recovery._training.learned()
    train(model, recovery, 40, teacher)
    finished = recovery.finish(model)
    report = recovery.report()
    behavior = behaviors_of(finished)["token-skipping"]
    assert behavior.rule == rule
    assert list(behavior.levels) == report["levels"]
    assert report["learned"] != before
    assert report["speedup"] == pytest.approx(1.6, rel=0.15)
    assert report["speedup"] == pytest.approx(report["dense_multiply_adds"] / report["multiply_adds"])
    assert accuracy(finished) > 0.8


def test_thresholds_reach_the_speedup_after_training_too():
    teacher = train(bert(num_hidden_layers=4), make_recovery("full"), 20)
    model = bert(num_hidden_layers=4)
    model.load_state_dict(teacher.state_dict())
    recovery = TokenSkippingRecovery(rule="ltp", speedup=1.6, temperature=2.0)
    prepare_model_with(recovery, model, teacher, 40)
    train(model, recovery, 40, teacher)
    fixed, rows = list(recovery._training.levels), list(recovery._batches)
    assert len(rows) == 8
    recovery._training.levels = [0.2 * level for level in fixed]  # as if attention had drifted
    finished = recovery.finish(model)
    report = recovery.report()
    assert report["speedup"] == pytest.approx(1.6, rel=0.15)

    alone = [
        {"input_ids": ids[mask.bool()][None]}
        for each in rows
        for ids, mask in zip(each["input_ids"], each["attention_mask"], strict=True)
    ]

    def run(skip):
        return measure_multiply_adds(finished, lambda: [finished(**each, skip_tokens=skip) for each in alone])

    with torch.no_grad():
        assert run(False) / run(True) == pytest.approx(report["speedup"], rel=0.1)


def prepare_model_with(recovery, model, teacher, steps):
    from types import SimpleNamespace

    from eckart.recovery.base import RecoveryContext

    recipe = SimpleNamespace(learning_rate=0.01, temperature=2.0)
    recovery.prepare(model, RecoveryContext(teacher, "classification", recipe, steps))


@pytest.mark.parametrize("soft", [0.0, 0.5])
def test_of_several_schedules_the_nearest_to_the_teacher_is_taken_and_weights_wait_for_it(soft):
    model, teacher = deep(), deep()
    recovery = TokenSkippingRecovery(speedup=1.5, soft=soft)
    prepare_model_with(recovery, model, teacher, 16)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, recovery, 8 if soft else 7, teacher)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    if soft:
        assert moved == {"eckart_token_skipping.moved"}
    else:
        assert not moved
        assert recovery._training.levels is None
        train(model, recovery, 8, teacher)
    tried = recovery.report()["tried"]
    assert ("learned" in tried) == bool(soft)
    assert len({tuple(each["levels"]) for each in tried.values()}) == len(tried)
    for each in tried.values():
        assert each["speedup"] == pytest.approx(1.5, rel=0.2)
        assert each["distance"] == pytest.approx(distance(model, teacher, recovery, each["levels"]), rel=1e-3)
    best = min(tried, key=lambda name: tried[name]["distance"])
    assert recovery.report()["chosen"] == best
    assert recovery._training.levels == tried[best]["levels"]
    train(model, recovery, 2, teacher)
    assert not torch.equal(model.state_dict()["classifier.weight"], weights["classifier.weight"])


def distance(model, teacher, recovery, levels):
    """KL to the teacher where tokens really leave, on the batches of the soft stage."""
    other = deep()
    names = set(other.state_dict())
    other.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    attach(other, TokenSkipping("power-bert", levels, "attention.self"), blocks_of_bert(other))
    costs = []
    for step in range(8):
        inputs = {name: value for name, value in batch(step).items() if name != "labels"}
        with torch.no_grad():
            mine, theirs = (each.eval()(**inputs).logits.div(2).log_softmax(-1) for each in (other, teacher))
        costs.append(4 * float((theirs.exp() * (theirs - mine)).sum(-1).mean()))
    return sum(costs) / len(costs)


def test_costs_count_linear_layers_and_attention_of_each_block():
    model = deep()
    cost = BlockCost.of(model, blocks_of_bert(model))
    linear = 4 * 16 * 16 + 2 * 16 * 32
    assert cost.linear == (linear,) * 4
    read = torch.tensor([[8, 4, 2, 1]])
    expected = sum(linear * t + 2 * 16 * t * t for t in (8, 4, 2, 1))
    assert cost.mean(read) == expected
    factored = eckart.load(tuning_folders() / "bert")
    assert BlockCost.of(factored, [f"encoder.layer.{i}" for i in range(2)]).linear[0] < 4 * 32 * 32 + 2 * 32 * 48


def blocks_of_bert(model):
    return [f"bert.encoder.layer.{i}" for i in range(len(model.bert.encoder.layer))]


@pytest.mark.parametrize(("settings", "named"), [
    ({"rule": "other"}, "rule must be one of power-bert, ltp"),
    ({"speedup": "0.5"}, "speedup=0.5 would be slower"),
    ({"soft": "1.5"}, r"soft must be in \[0, 1\]"),
    ({"penalty": "-1"}, "penalty"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, named):
    with pytest.raises(UsageError, match=named):
        make_recovery("token-skipping", settings)


def test_a_speedup_beyond_the_blocks_is_refused():
    model = deep()
    with pytest.raises(UsageError, match="the first of 4 blocks reads all tokens, so it stays below 4"):
        prepare_model_with(TokenSkippingRecovery(speedup=4.0), model, deep(), 10)


def test_without_a_wished_speedup_the_learned_schedule_is_taken():
    model = deep()
    assert attention_of(model.config) == "sdpa"
    recovery = TokenSkippingRecovery(speedup=0.0, penalty=5.0)
    prepare_model_with(recovery, model, deep(), 20)
    train(model, recovery, 20, deep())
    report = recovery.report()
    assert report["levels"] == report["learned"]
    assert math.isfinite(report["speedup"])
    assert report["speedup"] > 1
    finished = recovery.finish(model)
    assert attention_of(finished.config) == "eager"  # which shows its maps
    detach(finished)
    assert attention_of(finished.config) == "sdpa"


# -- folders ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    """A factored classifier that skips tokens, published."""
    place = tmp_path_factory.mktemp("skipping")
    torch.manual_seed(0)
    config = bert_config(num_labels=2)
    config.num_hidden_layers = 4
    model = scaled(transformers.BertForSequenceClassification(config))
    eckart.compress(model, reader(), method="svd", keep=0.5).save_pretrained(place / "small")
    options = {**QUICK, "max_steps": 3, "recovery_option": ["speedup=1.5"]}
    data = {"data": tuning_folders() / "rows.tsv", "data_label_column": "label"}
    return eckart.tune(place / "small", recovery="token-skipping", output_dir=place / "done", **data, **options)


def test_a_published_folder_loads_as_it_was_scored(skipped, tmp_path):
    assert skipped.report["kept"] == "after"
    given = {"input_ids": torch.arange(2, 38).view(3, 12), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    given["attention_mask"][1, 7:] = 0
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(skipped.folder)
    behavior = behaviors_of(loaded)["token-skipping"]
    assert behavior.levels == pytest.approx(skipped.report["recovered_by"]["levels"], abs=1e-6)
    with torch.no_grad():
        expected = skipped.model(**given).logits
        assert torch.equal(loaded(**given).logits, expected)
        assert not torch.allclose(loaded(**given, skip_tokens=False).logits, expected, atol=1e-4)
        loaded.save_pretrained(tmp_path)
        again = eckart.load(tmp_path)
        assert torch.equal(again(**given).logits, expected)
        body = transformers.AutoModel.from_pretrained(skipped.folder)
        assert behaviors_of(body)
        pooled = body(**given).pooler_output
        torch.testing.assert_close(loaded.classifier(pooled), expected, atol=1e-5, rtol=1e-4)
    classify = transformers.pipeline("text-classification", model=str(skipped.folder), device="cpu")
    assert behaviors_of(classify.model)
    texts_read = ["yes good fine 1", "no bad poor and a longer text than that"]
    one, two = ([classify(text)[0] for text in texts_read], classify(texts_read, batch_size=2))
    assert [each["score"] for each in one] == pytest.approx([each["score"] for each in two], rel=1e-4)


def test_a_report_says_what_is_saved(skipped):
    found = skipped.report["recovered_by"]
    assert found["scores"] == "attention.self"
    assert found["speedup"] == pytest.approx(1.5, rel=0.2)
    assert found["multiply_adds"] < found["dense_multiply_adds"]
    assert len(found["levels"]) == 3
    assert "teacher" in skipped.report["scores"]  # the model as it was


def test_sentence_embeddings_are_learned_from_the_model_as_it_was():
    options = {**QUICK, "max_steps": 3, "recovery_option": ["speedup=1.2"]}
    result = eckart.tune(
        tuning_folders() / "bert", recovery="token-skipping", data=tuning_folders() / "text.txt", **options
    )
    assert result.report["task"] == "embedding"
    output = result.model(input_ids=torch.arange(20).view(2, 10))
    assert output.last_hidden_state.shape == (2, 10, 32)
    assert behaviors_of(result.model)
