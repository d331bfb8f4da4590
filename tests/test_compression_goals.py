"""Plans that seconds or a loss decide: by measured seconds, to a speed, to a quality."""

from __future__ import annotations

import json

import pytest
import torch
from architectures import Architecture

import eckart
from eckart.allocation import Choice
from eckart.compression import choose_plan, machine_profile
from eckart.compression.goals import parse_loss
from eckart.compression.pricing import count_elements, count_seconds, price_elements_and_seconds
from eckart.errors import UsageError
from eckart.speed.profile import Curve, LayerRequest, Profile
from eckart.storage.store import MemoryStore

SMALL = Architecture(
    "llama",
    "LlamaForCausalLM",
    "LlamaConfig",
    {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "AutoModelForCausalLM",
)  # fmt: skip
OPTIONS = {"method": "eckart", "refit": False, "latency_batch_size": 2, "latency_length": 8}
PER_PRODUCT = 1e-9


@pytest.fixture(scope="module")
def model():
    return SMALL.model()


@pytest.fixture(scope="module")
def batches():
    return SMALL.batches(rows=8, count=6)


def work_of(key, rank: int) -> float:
    """Multiply-adds of a measured layer."""
    form, columns, heights = key
    rows = sum(heights)
    if form == "dense":
        return rows * columns
    if form == "sliced":  # heights: neurons of each projection up, outputs of the one down
        return rank * (columns * (len(heights) - 1) + heights[-1])
    return rank * (rows + columns - (rank if form == "pivoted" else 0))


def invented_profile(requests, slowness=lambda key: 1.0, rest: float = 0.0, **options) -> Profile:
    """Seconds as the multiply-adds say, times how slow the kind of layer is; the rest of the model takes `rest`."""
    grids = {}
    for request in requests:
        request = request if isinstance(request, LayerRequest) else LayerRequest(*request)
        for key in request.keys:
            grids.setdefault(key, set()).update({0} if request.form == "dense" else request.ranks)
    curves = {
        key: Curve(
            tuple(sorted(ranks)), tuple(PER_PRODUCT * slowness(key) * work_of(key, rank) for rank in sorted(ranks))
        )
        for key, ranks in grids.items()
    }
    return Profile(
        "cpu", "invented", 1, "float32", 16, curves=curves, model_seconds=2 * WORK * PER_PRODUCT * (1 + rest)
    )


BLOCK = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 96 * 64
WORK = BLOCK  # of one of the two blocks


def invent(monkeypatch, slowness=lambda key: 1.0, rest: float = 0.0) -> None:
    monkeypatch.setattr(
        machine_profile, "measure_profile", lambda requests, **options: invented_profile(requests, slowness, rest)
    )


def seconds_of(result, slowness=lambda key: 1.0) -> float:
    shapes = {row["site"]: tuple(row["shape"]) for row in result.report["sites"]}
    groups = {}
    for name, choice in result.plan.choices.items():
        groups.setdefault(choice.basis or name, []).append(name)
    total = 0.0
    for holder, members in groups.items():
        choice = result.plan.choices[holder]
        if choice.form == "sliced":
            total += PER_PRODUCT * slowness(("sliced", 64, (96, 96, 64))) * choice.rank * 3 * 64
            continue
        key = choice.form, shapes[holder][1], tuple(shapes[name][0] for name in members)
        total += PER_PRODUCT * slowness(key) * work_of(key, choice.rank)
    return total


def test_numbers_and_seconds_both_stay_within_the_share(model, batches, monkeypatch):
    def slow(key):
        return 1.5 if key[0] == "pivoted" else 1.0

    invent(monkeypatch, slow)
    result = eckart.compress(model, data=batches, keep=0.6, objective="latency", **OPTIONS)
    assert result.report["kept"]["of_sites"] <= 0.6
    assert seconds_of(result, slow) <= 0.6 * 2 * WORK * PER_PRODUCT
    assert seconds_of(result, slow) > 0.5 * 2 * WORK * PER_PRODUCT


@pytest.mark.parametrize("slowest", ["lowrank", "pivoted", "joint", "sliced"])
def test_no_form_is_taken_that_is_slower_than_the_dense_weight(model, batches, monkeypatch, slowest):
    invent(monkeypatch, lambda key: 50.0 if key[0] == slowest else 1.0)
    result = eckart.compress(model, data=batches, keep=0.6, objective="latency", **OPTIONS)
    assert slowest not in {choice.form for choice in result.plan.choices.values()}


def test_weights_whose_factors_are_all_slower_stay_dense(model, batches, monkeypatch):
    """Here those of the feed-forward layers' way down; what they are not made smaller by, the others are."""
    invent(monkeypatch, lambda key: 99.0 if key[0] != "dense" and (key[1] == 96 or key[0] == "sliced") else 1.0)
    result = eckart.compress(model, data=batches, keep=0.6, objective="latency", **OPTIONS)
    forms = {name: choice.form for name, choice in result.plan.choices.items()}
    assert {form for name, form in forms.items() if "down_proj" in name} == {"dense"}
    assert {form for name, form in forms.items() if "down_proj" not in name} != {"dense"}
    reasons = {row["site"]: row["reason"] for row in result.report["sites"]}
    assert "none are faster" in reasons["model.layers.0.mlp.down_proj"]
    assert any(" ms in place of " in reason for reason in reasons.values())
    assert result.plan.to_json()["sites"]["model.layers.0.mlp.down_proj"]["reason"]


def test_a_named_form_is_the_only_one_that_is_weighed(model, batches, monkeypatch):
    invent(monkeypatch)
    result = eckart.compress(model, data=batches, keep=0.6, objective="latency", form="lowrank", **OPTIONS)
    assert {choice.form for choice in result.plan.choices.values()} <= {"lowrank", "dense"}


def test_a_share_of_seconds_that_cannot_be_reached_names_the_smallest(model, batches, monkeypatch):
    invent(monkeypatch, lambda key: 1.0 if key[0] == "dense" else 4.0)
    with pytest.raises(
        UsageError, match=r"--keep 0\.05 --objective latency: .* smallest keep .* is (0\.\d+)"
    ) as refusal:
        eckart.compress(model, data=batches, keep=0.05, objective="latency", **OPTIONS)
    keep = float(str(refusal.value).split("reached is ")[1].split(":")[0])
    assert eckart.compress(model, data=batches, keep=keep, objective="latency", **OPTIONS)


def pretend_speeds(monkeypatch, factor: float) -> list[float]:
    """Models on trial run as fast as the invented profile says, times a factor; returns the speeds that were seen."""
    seen = []

    def measure(self, plan):
        seconds = count_seconds(self.shapes, self._profile())
        groups = {}
        for name, choice in plan.choices.items():
            groups.setdefault(choice.basis or name, {})[name] = choice
        whole = self._profile().model_seconds
        rest = whole - 2 * WORK * PER_PRODUCT
        now = rest + factor * sum(seconds(choices) for choices in groups.values())
        seen.append(whole / now)
        return whole, now

    monkeypatch.setattr(choose_plan.PlanChoice, "_measure", measure)
    return seen


@pytest.mark.parametrize("factor", [1.0, 1.2, 0.8])
def test_speedup_is_reached_as_measured_and_no_more_is_given_up_than_needed(model, batches, monkeypatch, factor):
    invent(monkeypatch, rest=0.3)
    seen = pretend_speeds(monkeypatch, factor)
    result = eckart.compress(model, data=batches, speedup=1.4, **OPTIONS)
    reached = result.report["found"]["speedup"]["reached"]
    assert 1.4 <= reached <= 1.4 * 1.06
    assert reached == pytest.approx(min(speed for speed in seen if speed >= 1.4), abs=1e-3)
    assert (len(seen) == 1) == (factor == 1.0)


def test_speedup_out_of_reach_names_the_highest(model, batches, monkeypatch):
    invent(monkeypatch, rest=1.0)
    pretend_speeds(monkeypatch, 1.0)
    with pytest.raises(UsageError, match=r"--speedup 2\.5: .* highest speed-up to ask for is about 1\.\d+"):
        eckart.compress(model, data=batches, speedup=2.5, **OPTIONS)


def test_models_on_trial_are_measured_for_real(model, batches):
    """The same steps with real seconds: too short here to reach a speed for sure, so nothing is said of its size."""
    result = eckart.compress(model, data=batches, speedup=1.0001, **OPTIONS)
    assert result.report["found"]["speedup"]["reached"] > 0
    assert "planning" in result.report["seconds"]


def test_profile_is_written_and_read_again(model, batches, tmp_path, monkeypatch):
    invent(monkeypatch)
    file = tmp_path / "profile.json"
    options = OPTIONS | {"keep": 0.6, "objective": "latency", "profile": str(file)}
    first = eckart.compress(model, data=batches, **options)
    assert Profile.read(file).tokens == 16
    monkeypatch.delattr(machine_profile, "measure_profile")
    second = eckart.compress(model, data=batches, **options)
    assert second.plan == first.plan
    with pytest.raises(UsageError, match=r"profile\.json: was measured on 16 tokens .* 4 x 8"):
        eckart.compress(model, data=batches, **options | {"latency_batch_size": 4})


def test_max_loss_takes_the_smallest_size_that_keeps_to_it(model, batches):
    allowed = 0.02
    result = eckart.compress(model, data=batches, max_loss="2%", **OPTIONS)
    found = result.report["found"]["max_loss"]
    assert found["lost"] <= allowed == found["allowed"]
    assert result.report["kept"]["of_sites"] <= found["keep"] < 0.98
    held = pytest.MonkeyPatch()
    with held.context() as patch:
        losses = {}
        own = choose_plan.loss_of

        def watch(context, compressed):
            losses[len(losses)] = own(context, compressed)
            return losses[len(losses) - 1]

        patch.setattr(choose_plan, "loss_of", watch)
        again = eckart.compress(model, data=batches, max_loss="0.02", **OPTIONS)
    assert again.plan == result.plan
    assert any(loss > allowed for loss in losses.values())  # a smaller size was tried and lost too much


def test_max_loss_that_no_size_keeps_to_is_refused(model, batches, monkeypatch):
    monkeypatch.setattr(choose_plan, "loss_of", lambda context, compressed: 0.5)
    with pytest.raises(UsageError, match=r"--max-loss 1%: at keep 0\.98 held-out data shows a loss of 50\.00%"):
        eckart.compress(model, data=batches, max_loss="1%", **OPTIONS)


def test_a_plan_that_was_searched_for_is_not_searched_for_again(model, batches, monkeypatch):
    """A run that is resumed makes the plan of the first part of it, whatever it would measure now."""
    kept = {}

    class Keeping(MemoryStore):
        def write(self, stage, name, tensors, content):
            if stage == choose_plan.STAGE:
                kept[name] = json.loads(json.dumps(content))
            super().write(stage, name, tensors, content)

        def entries(self, stage):
            return list(kept) if stage == choose_plan.STAGE else super().entries(stage)

        def read(self, stage, name):
            return ({}, kept[name]) if stage == choose_plan.STAGE else super().read(stage, name)

    from eckart.compression.workspace import Workspace

    first = eckart.compress(model, data=batches, max_loss="2%", workspace=Workspace(store=Keeping()), **OPTIONS)
    monkeypatch.setattr(choose_plan, "loss_of", lambda context, compressed: 1.0)
    second = eckart.compress(model, data=batches, max_loss="2%", workspace=Workspace(store=Keeping()), **OPTIONS)
    assert second.plan.choices == first.plan.choices
    assert second.report["found"] == first.report["found"]


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5%", 0.005), ("0.02", 0.02)])
def test_a_loss_is_a_share(text, share):
    assert parse_loss(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "much", "0", "1", "120%", "-1%", "nan"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(UsageError, match="--max-loss"):
        parse_loss(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speedup": 1.5, "keep": 0.5}, "--keep and --speedup"),
        ({"speedup": 1.5, "max_loss": "1%"}, "--speedup and --max-loss"),
        ({"max_loss": "1%", "plan": "plan.json"}, "--plan and --max-loss"),
        ({"profile": "profile.json"}, "--profile profile.json: no seconds are weighed"),
        ({"objective": "latency", "method": "drone"}, "--objective latency with --allocation uniform"),
        ({"speedup": 2.0, "method": "svd"}, "--speedup with --allocation uniform"),
    ],
)
def test_goals_that_contradict_each_other_are_refused(model, batches, options, words):
    with pytest.raises(UsageError, match=words):
        eckart.compress(model, data=batches, **options)


def test_a_price_counts_whichever_is_more_of_a_choice():
    shapes = {"a": (64, 64), "b": (32, 64)}
    profile = invented_profile(
        [("dense", 64, (64,)), ("dense", 64, (32,)), ("lowrank", 64, (64,), (8, 16)), ("pivoted", 64, (64,), (8, 16))],
        lambda key: 3.0 if key[0] == "pivoted" else 0.5,
    )

    class Half:
        elements = 0

    price = price_elements_and_seconds(shapes, Half(), profile)
    elements, seconds = count_elements(shapes), count_seconds(shapes, profile)
    low, pivoted = ({"a": Choice(form, 16)} for form in ("lowrank", "pivoted"))
    dense = sum(seconds({name: Choice("dense")}) for name in shapes)
    rate = sum(rows * columns for rows, columns in shapes.values()) / dense
    assert price.cost(low) == elements(low) == 16 * 128
    assert price.cost(pivoted) == pytest.approx(rate * seconds(pivoted))
    assert price.cost(pivoted) > elements(pivoted)
    assert torch.isinf(torch.tensor(price.cost({"a": Choice("lowrank", 3)})))  # not measured
