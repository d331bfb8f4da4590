"""Sites that no text reaches: how many numbers they hold, why, and a fraction of the others alone."""

from __future__ import annotations

import re

import pytest
from architectures import BY_NAME
from test_data_models import build, byte_tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import eckart
from eckart.calibration import NO_GRADIENT, UNREACHED
from eckart.compression.budget import Budget, describe_dense
from eckart.errors import UsageError


@pytest.fixture(scope="module")
def experts():
    """Eight experts a layer, of which a token is sent to one."""
    config = Qwen3MoeConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=8, num_experts_per_tok=1,
    )  # fmt: skip
    return build(Qwen3MoeForCausalLM, config).eval()


def compressed(model, keep, **options):
    return eckart.compress(model, byte_tokenizer(), data=["hi"], keep=keep, **options)


def test_a_budget_says_what_no_text_reached(experts):
    with pytest.raises(UsageError) as caught:
        compressed(experts, 0.5)
    message = str(caught.value)
    for part in ("--keep 0.5", "no token of the calibration data reached it", "the other sites pay for them",
                 "--num-samples", "--ignore 'model.layers.*.mlp.experts", "--keep-of reached"):  # fmt: skip
        assert part in message
    counts = re.search(r"(\d+) of (\d+) sites, (\d+) of (\d+)", re.sub(r"(?<=\d),(?=\d)", "", message)).groups()
    dense, total, numbers, held = map(int, counts)
    assert dense < total
    assert 0 < numbers < held
    least = float(re.search(r"can be reached is (\d\.\d+)", message).group(1))
    assert numbers / held < least < 1
    assert compressed(experts, least).report["kept"]["of_sites"] <= least + 1e-9


@pytest.mark.parametrize("allocation", ["loss", "uniform"])
def test_a_fraction_of_what_was_reached_leaves_the_rest_out(experts, allocation):
    result = compressed(experts, 0.5, keep_of="reached", allocation=allocation)
    report, choices = result.report, result.plan.choices
    names = {site["site"] for site in report["sites"] if "left_dense" in site}
    shapes = {site["site"]: tuple(site["shape"]) for site in report["sites"] if site["site"] not in names}
    stored = sum(choices[name].stored(*shape) for name, shape in shapes.items())
    reached = sum(rows * columns for rows, columns in shapes.values())
    assert names
    assert 0.35 < stored / reached <= 0.5
    assert all(choices[name].form == "dense" for name in names)
    assert any("beside that fraction" in note and "--keep-of reached" not in note for note in report["notes"])
    others = report["kept"]["matrix_elements_before"] - reached
    assert report["kept"]["matrix_elements_after"] == stored + others
    assert report["kept"]["matrix_elements_after"] + report["kept"]["unused"] == int(0.5 * reached) + others


def test_what_stays_dense_is_told_once_with_what_helps():
    shapes = {"a.0.up": (20, 10), "pooler.dense": (10, 10), "b.experts.3.up": (30, 20)}
    told = describe_dense({"pooler.dense": NO_GRADIENT}, shapes, "sites")
    assert told == (
        "1 of 3 sites, 100 of 900 numbers, stays dense, and the other sites pay for it: pooler.dense (the output that "
        "is used does not depend on it: the loss has no gradient there). Leave it out: --ignore pooler.dense; or count "
        "the others alone: --keep-of reached."
    )
    assert "Give more text (--num-samples); or" in describe_dense({"b.experts.3.up": UNREACHED}, shapes, "sites")
    never = describe_dense({"a.0.up": UNREACHED, "pooler.dense": NO_GRADIENT}, shapes, "sites")
    assert "--num-samples" not in never
    assert "Give data that reach them" in never
    assert "leave them out: --ignore 'a.*.up' --ignore pooler.dense" in never
    many = {f"layer{i}.up": (2, 2) for i in range(20)}
    told = describe_dense(dict.fromkeys(many, UNREACHED), many, "sites")
    assert "layer7.up and 12 more (" in told
    assert told.count("--ignore") == 3


def test_what_stays_dense_is_not_told_again_by_the_refit():
    kind = BY_NAME["bert"]
    notes = eckart.compress(kind.model(), data=kind.batches()[:1], keep=0.5, refit=True).report["notes"]
    assert not any("refit was left out" in note for note in notes)
    assert [note.partition(" sites")[0] for note in notes if "pooler.dense" in note] == ["1 of 13"]


def test_budgets_leave_out_what_they_are_told():
    budget = Budget(500, 0, 1000, 0.5, "reached")
    assert budget.leaving_out(0) == budget
    assert budget.leaving_out(400) == Budget(700, -400, 600, 0.5, "reached")
    for of in ("sites", "model"):
        assert Budget(500, 0, 1000, 0.5, of).leaving_out(400).elements == 500
    left = {"a.0.up": "why", "a.1.up": "why"}
    told = describe_dense(left, {"a.0.up": (20, 10), "a.1.up": (20, 10), "b": (30, 20)}, "reached")
    assert told.startswith(
        "2 of 3 sites, 400 of 1,000 numbers, stay dense, beside that fraction: a.0.up, a.1.up (why)."
    )
    assert "--ignore 'a.*.up'" in told
    assert "--keep-of reached" not in told
    assert describe_dense({}, {"b": (30, 20)}, "sites") == ""
    refused = budget.leaving_out(400).make_error(700, "too small", told)
    assert "can be reached is 0.5000: raise --keep, or name more --targets. 2 of 3 sites" in str(
        refused
    )  # 300 of the 600 that were reached
