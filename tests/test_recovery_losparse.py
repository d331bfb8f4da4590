"""LoSparse: it splits exactly, prunes for good, meets its budget and removes what it pruned."""

import copy

import pytest
import torch
from problems import close
from torch.nn import functional
from transformers import AutoModelForSequenceClassification
from tuning_problem import accuracy, batch, bert, gpt2, logits, prepare_model, train

from eckart.checkpoint.description import attach_config
from eckart.checkpoint.save import save
from eckart.checkpoint.stored import stored_tensors
from eckart.errors import UsageError
from eckart.forms import MaskedLowRankSparse
from eckart.model import factored_modules, find_sites
from eckart.recovery import LoSparse, LoSparseDistilled

STEPS = 24


def masked(model) -> dict[str, MaskedLowRankSparse]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLowRankSparse)}


@pytest.mark.parametrize("make", [bert, gpt2])
def test_split_changes_nothing_and_its_ranks_keep_to_their_share(make):
    model = make()
    sites = find_sites(model).chosen
    split = prepare_model(copy.deepcopy(model), LoSparse(keep=0.5), STEPS)
    close(logits(split), logits(model), 1e-5)
    found = masked(split)
    assert list(found) == [site.name for site in sites]
    for site in sites:
        module = found[site.name]
        factors = module.rank * (site.out_features + site.in_features)
        assert factors <= site.elements / 8 or module.rank == 1
        weight = module.first.weight.norm(dim=1), module.second.weight.norm(dim=0)
        close(*weight, 1e-4)  # the root of each singular value on either side


@pytest.mark.parametrize("make", [bert, gpt2])
def test_learns_prunes_to_its_budget_and_removes_what_it_pruned(make, tmp_path):
    model, recovery = make(), LoSparse(keep=0.4, every=4)
    sites = find_sites(model).chosen
    prepare_model(model, recovery, STEPS)
    counts, before = [], {name: module.alive.clone() for name, module in masked(model).items()}

    def watch(step):
        now = {name: module.alive for name, module in masked(model).items()}
        assert not any(bool((now[name] & ~before[name]).any()) for name in now)  # none comes back
        before.update({name: alive.clone() for name, alive in now.items()})
        counts.append(sum(int(alive.sum()) for alive in now.values()))
        for module in masked(model).values():
            assert not module.sparse.weight[~module.alive].any()

    train(model, recovery, STEPS, watch=watch)
    assert len(set(counts)) > 2  # in several goes
    assert counts[0] == sum(site.out_features for site in sites)  # not in the warm-up
    assert counts[-1] == counts[-1 - 4] < counts[0] / 2  # not in the final phase
    expected = logits(model)
    alive = {name: module.alive.clone() for name, module in masked(model).items()}
    model = recovery.finish(model)
    close(logits(model), expected, 1e-5)
    assert accuracy(model) > 0.9
    forms = factored_modules(model)
    assert not masked(model)
    for name, module in forms.items():
        if module.form == "lowrank-sparse":
            assert torch.equal(module.places.long(), alive[name].nonzero().flatten())
    # What is stored, counted in the files.
    save(model, tmp_path / "out")
    total = sum(site.elements for site in sites)
    stored = 0
    for key, entry in stored_tensors(tmp_path / "out").items():
        site = next((site for site in sites if key.startswith(f"{site.name}.")), None)
        if site is not None and not key.endswith(".bias"):
            stored += torch.Size(entry.shape).numel()
    report = recovery.report()
    assert stored == report["stored_elements"]
    assert report["keep"] == stored / total <= 0.4
    assert stored > 0.3 * total
    assert set(report["forms"].values()) <= {"lowrank", "lowrank-sparse", "dense"}
    assert "lowrank-sparse" in report["forms"].values()


def test_from_pretrained_gives_the_same_logits(tmp_path):
    model, recovery = bert(), LoSparse(keep=0.4, every=4)
    model = recovery.finish(train(prepare_model(model, recovery, 12), recovery, 12))
    attach_config(model)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again), logits(model))
    assert any(module.form == "lowrank-sparse" for module in factored_modules(again).values())


def test_importance_is_the_mean_of_its_steps():
    model, recovery = bert(), LoSparse(keep=0.4, every=2, beta=0.75, warmup=0.9, final=0.1)
    prepare_model(model, recovery, 100)
    name, module = next(iter(masked(model).items()))
    terms = []
    for step in range(4):
        model.zero_grad()
        model(**batch(step)).loss.backward()
        terms.append((module.sparse.weight * module.sparse.weight.grad).abs().mean(1).detach())
        recovery.after_backward(model, step)
        recovery.after_step(model, step)
    first, second = (terms[0] + terms[1]) / 2, (terms[2] + terms[3]) / 2
    close(recovery._importance[name], 0.75 * 0.25 * first + 0.25 * second, 1e-5)


def test_a_step_in_parts_counts_once():
    model, recovery = bert(), LoSparse(keep=0.4, every=1, warmup=0.9, final=0.1)
    prepare_model(model, recovery, 100)
    name, module = next(iter(masked(model).items()))
    for part in range(2):
        (model(**batch(part)).loss / 2).backward()
        recovery.after_backward(model, 0)
    recovery.after_step(model, 0)
    close(recovery._importance[name], 0.15 * (module.sparse.weight * module.sparse.weight.grad).abs().mean(1), 1e-5)


def test_budget_is_met_without_any_step():
    model, recovery = (
        bert(),
        LoSparse(keep=0.3, targets="query,intermediate.dense", ignore="layer.0.intermediate.dense"),
    )
    prepare_model(model, recovery, 0)
    model = recovery.finish(model)
    assert recovery.report()["keep"] <= 0.3
    assert len(recovery.report()["forms"]) == 3
    assert any("no gradient was seen" in note for note in recovery.context.notes)


def test_nothing_is_pruned_in_the_first_phase_and_nothing_more_in_the_last():
    model, recovery = bert(), LoSparse(keep=0.4, every=1, warmup=0.5, final=0.25)
    prepare_model(model, recovery, 16)
    counts = []
    train(model, recovery, 16, watch=lambda _: counts.append(sum(int(m.alive.sum()) for m in masked(model).values())))
    everything = sum(site.out_features for site in find_sites(bert()).chosen)
    assert counts[:8] == [everything] * 8
    assert everything > counts[8] > counts[9] > counts[10] > counts[11]
    assert counts[11:] == [counts[11]] * 5


def test_distillation_is_the_weighted_sum():
    recovery, teacher, model = LoSparseDistilled(keep=0.4, distil=0.5, layers=3.0), bert(), bert(initializer_range=0.1)
    assert recovery.needs_teacher
    assert recovery.needed_outputs == {"hidden_states"}
    assert not LoSparse.needs_teacher
    inputs = batch(0)
    inputs["attention_mask"][:, 6:] = 0
    with torch.no_grad():
        for each in (model, teacher):
            each.classifier.weight.mul_(30)  # so that the divergence is not the same both ways
        mine, its = (each(**inputs, output_hidden_states=True) for each in (model, teacher))
    p, q = (functional.softmax(each.logits / 2, -1) for each in (its, mine))
    divergence = 4 * (p * (p / q).log()).sum(-1).mean()
    pairs = zip(mine.hidden_states, its.hidden_states, strict=True)
    layers = torch.stack([(a - b)[:, :6].square().mean() for a, b in pairs]).mean()
    close(recovery.loss(mine, its, inputs, mine.loss), mine.loss + 0.5 * (divergence + 3 * layers), 1e-5)
    plain = LoSparseDistilled(keep=0.4, layers=0.0)
    assert plain.needed_outputs == frozenset()
    close(plain.loss(mine, its, inputs, mine.loss), mine.loss + divergence, 1e-5)


def test_refusals():
    for options in ({"keep": 0}, {"keep": 1}, {"low_rank": 0.5}, {"every": 0}, {"beta": 1}, {"warmup": 0.9}):
        with pytest.raises(UsageError):
            LoSparse(**options)
    with pytest.raises(UsageError, match=r"keep 0\.05 is 217 numbers.*480.*the smallest keep is 0\.11"):
        prepare_model(bert(), LoSparse(keep=0.05), STEPS)
