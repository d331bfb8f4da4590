"""Statistics: sums that do not depend on how text is cut, and gradients of the loss that is meant."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import close, few_examples, normal, unchanged
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from eckart.errors import DataError, NumericalError
from eckart.moments import (
    Fisher,
    Gatherer,
    Moments,
    SecondMoment,
    accumulate,
    gather,
    generator,
    labeled_loss,
    merge,
    pack,
    sampled_loss,
    shared_inputs,
    unpack,
)
from eckart.moments.accumulate import BLOCK, add_gram, complete
from eckart.moments.input_shift import InputShift

# -- accumulating ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 5, 3 * BLOCK])
def test_gram_by_blocks_is_the_gram(width):
    first, second = normal(5, width), normal(3, width, seed=1)
    total = torch.zeros(width, width, dtype=torch.float64)
    with unchanged(first, second):
        add_gram(total, first)
        add_gram(total, second)
    rows = torch.cat([first, second])
    complete(total)
    close(total, rows.mT @ rows, 1e-13)


def test_gram_below_the_block_diagonal_is_not_computed():
    total = torch.zeros(2 * BLOCK, 2 * BLOCK)
    add_gram(total, torch.ones(2, 2 * BLOCK))
    assert not total[BLOCK:, :BLOCK].any()


def second_moment(rows: Tensor, parts: int = 1) -> SecondMoment:
    moment = SecondMoment(rows.shape[1], True, True)
    for part in rows.chunk(parts):
        moment.update(part, "test")
    return moment


def same(first: SecondMoment, second: SecondMoment, tolerance: float = 1e-6) -> None:
    assert first.count == second.count
    close(first.mean_gram, second.mean_gram, tolerance)
    scale = float(first.mean_absolute.max())
    assert float((first.mean - second.mean).abs().max()) <= tolerance * scale
    close(first.mean_absolute, second.mean_absolute, tolerance)


@few_examples
@given(tokens=st.integers(2, 40), width=st.integers(1, 12), parts=st.integers(1, 9), seed=st.integers(0, 99))
def test_batches_do_not_matter(tokens, width, parts, seed):
    rows = normal(tokens, width, seed=seed).float().double()  # exact in what is summed
    whole = second_moment(rows)
    close(whole.mean_gram.double(), rows.mT @ rows / tokens, 1e-6)
    # A mean may cancel to almost nothing: its rounding is relative to the summed magnitudes.
    assert float((whole.mean - rows.mean(0)).abs().max()) <= 1e-6 * float(rows.abs().mean(0).max())
    close(whole.mean_absolute, rows.abs().mean(0), 1e-6)
    same(second_moment(rows, parts), whole)
    first, second = rows[: tokens // 2], rows[tokens // 2 :]
    merged = second_moment(first)
    merged.merge(second_moment(second))
    same(merged, whole)


@pytest.mark.parametrize("width", [6, 2 * BLOCK + 1])
def test_merging_into_an_empty_one_leaves_the_other_alone(width):
    rows = normal(4, width)
    full, empty = second_moment(rows), SecondMoment(width, True, True)
    complete(full.gram)  # what a mean asked of it would do
    with unchanged(full.gram, full.total, full.absolute):
        empty.merge(full)
        same(empty, full)
        empty.update(rows.float(), "test")
    same(empty, second_moment(torch.cat([rows, rows])))
    full.merge(SecondMoment(width, True, True))
    same(full, second_moment(rows))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("width", [6, 2 * BLOCK + 1])
def test_metrics_read_the_sum_where_it_lies(width, centered):
    """Also after more was added to a sum that had been made symmetric."""
    rows = normal(9, width).float()
    moments = Moments(SecondMoment(width), centered=centered)
    for part in rows.chunk(2):
        moments.inputs.update(part, "test")
        metric = moments.input_metric
        assert metric.full is moments.inputs.gram
        close(metric.full, metric.full.mT, 1e-6)
    expected = torch.cov(rows.double().mT, correction=0) if centered else rows.double().mT @ rows.double() / 9
    close(moments.input_gram, expected.float(), 1e-5)
    probe = normal(width, 3).float()
    close(moments.input_metric.times(probe), expected.float() @ probe, 1e-5)


def test_inputs_that_never_vary_have_no_covariance():
    """Not one of rounding, which would count as a direction."""
    for dtype in (torch.float32, torch.float64):
        moments = Moments(second_moment(normal(1, 7).to(dtype).expand(5, 7)), centered=True)
        assert not moments.input_gram.any()
        assert moments.input_metric.shrunk(0.5).mean_diagonal == 0


@pytest.mark.parametrize("width", [6, 2 * BLOCK + 1])
def test_a_sum_that_was_read_can_be_added_to(width):
    first, second = normal(5, width).float(), normal(4, width, seed=1).float()
    moment, other = second_moment(first), second_moment(second)
    assert bool(moment.mean_gram.any())
    moment.merge(other)
    same(moment, second_moment(torch.cat([first, second])))
    moment.update(second, "test")
    same(moment, second_moment(torch.cat([first, second, second])))
    same(SecondMoment.from_state(moment.state()), moment)
    close(moment.gram.triu(1), moment.gram.tril(-1).mT, 1e-6)


def test_saved_sums_are_read_and_never_written():
    moment = second_moment(normal(5, 2 * BLOCK + 1))
    state = moment.state()
    with unchanged(*state.values()):
        assert bool(SecondMoment.from_state(state).metric.matrix.any())


def test_without_gram_only_the_gram_is_gone():
    whole = second_moment(normal(5, 4))
    light = whole.without_gram()
    assert (light.gram, light.count) == (None, 5)
    assert whole.gram is not None
    assert torch.equal(light.mean, whole.mean)
    light.update(torch.ones(1, 4), "test")
    assert light.gram is None


def test_half_precision_inputs_do_not_overflow():
    rows = torch.full((64, 3), 3e4, dtype=torch.float16)
    moment = second_moment(rows)
    assert moment.gram.dtype == torch.float64
    close(moment.mean_gram.double(), torch.full((3, 3), float(rows[0, 0]) ** 2, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused_and_nothing_is_added(bad):
    moment = second_moment(torch.ones(2, 3))
    rows = torch.ones(4, 3)
    rows[1, 2] = rows[3, 0] = bad
    with pytest.raises(NumericalError, match=r"input of h\.0, batch 7: 2 of 12 values.*bfloat16"):
        moment.update(rows, "input of h.0, batch 7")
    same(moment, second_moment(torch.ones(2, 3)))


def per_sequence(inputs: Tensor, gradients: Tensor) -> Tensor:
    """(m, n): the squared gradient of W of each sequence, summed."""
    return sum((g.mT @ x).square() for x, g in zip(inputs, gradients, strict=True))


def test_fisher_sums_squares_of_sequences_not_of_tokens_or_batches():
    inputs, gradients = normal(6, 5, 4), normal(6, 5, 3, seed=1)
    squared = per_sequence(inputs, gradients)
    whole, parts, other = Fisher(), Fisher(), Fisher()
    whole.update(inputs, gradients)
    for i in range(4):
        parts.update(inputs[i : i + 1], gradients[i : i + 1])
    other.update(inputs[4:], gradients[4:])
    parts.merge(other)
    for fisher in (whole, parts):
        assert fisher.sequences == 6
        close(fisher.rows, squared.sum(1), 1e-6)
        close(fisher.columns, squared.sum(0), 1e-6)


@pytest.mark.parametrize("entries", [1, 7, 13, 40])
def test_fisher_of_blocks_is_the_fisher(entries, monkeypatch):
    inputs, gradients = normal(5, 4, 3), normal(5, 4, 6, seed=1)
    whole, cut = Fisher(), Fisher()
    whole.update(inputs, gradients)
    monkeypatch.setattr(accumulate, "FISHER_ENTRIES", entries)
    cut.update(inputs, gradients)
    close(cut.rows, whole.rows, 1e-6)
    close(cut.columns, whole.columns, 1e-6)


def one_site(seed: int) -> Moments:
    rows = normal(4, 3, seed=seed)
    fisher = Fisher()
    fisher.update(rows[None], rows[None])
    return Moments(second_moment(rows), second_moment(rows), fisher, sequences=2)


def test_moments_of_two_processes_merge():
    first, second = one_site(0), one_site(1)
    first.merge(second)
    first.inputs.merge(second.inputs)
    assert (first.sequences, first.fisher.sequences) == (4, 2)
    assert first.inputs.count == first.gradients.count == 8
    same(first.gradients, second_moment(torch.cat([normal(4, 3), normal(4, 3, seed=1)])))
    same(first.inputs, first.gradients)


def two_sites(seed: int) -> dict[str, Moments]:
    first, second = one_site(seed), one_site(seed + 1)
    return {"gate": first, "up": Moments(first.inputs, second.gradients, second.fisher, sequences=2)}


def test_inputs_of_a_group_merge_once():
    first, second = two_sites(0), two_sites(5)
    with unchanged(second["up"].inputs.gram, second["up"].gradients.gram):
        merge(first, second)
    assert first["gate"].inputs is first["up"].inputs
    assert first["gate"].inputs.count == first["up"].gradients.count == 8
    assert first["up"].sequences == 2 * first["up"].fisher.sequences == 4
    same(first["up"].inputs, second_moment(torch.cat([normal(4, 3), normal(4, 3, seed=5)])))
    same(first["up"].gradients, second_moment(torch.cat([normal(4, 3, seed=1), normal(4, 3, seed=6)])))


def test_sites_that_only_one_process_reached_join_their_group():
    first, second = two_sites(0), two_sites(5)
    del first["up"]
    second["lone"] = one_site(9)
    merge(first, second)
    assert first["up"].inputs is first["gate"].inputs
    assert first["gate"].inputs.count == 8
    assert first["up"].gradients.count == first["lone"].inputs.count == 4


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


PARTS = {
    "all": one_site(0),
    "inputs alone": Moments(SecondMoment(3)),
    "inputs alone, seen": Moments(second_moment(normal(4, 3)), sequences=3, centered=True),
    "no gram": Moments(second_moment(normal(4, 3)).without_gram(), SecondMoment(2), Fisher()),
}


@pytest.mark.parametrize("moments", PARTS.values(), ids=PARTS)
def test_state_and_back(moments):
    state = moments.state()
    again = Moments.from_state(state)
    assert equal(again.state(), state)
    assert (again.sequences, again.centered) == (moments.sequences, moments.centered)
    assert again.inputs.with_gram == moments.inputs.with_gram
    assert (again.gradients is None, again.fisher is None) == (moments.gradients is None, moments.fisher is None)
    assert all(
        tensor.device.type == "cpu" and tensor.dtype == torch.int64 for tensor in state.values() if tensor.dim() == 0
    )
    again.inputs.update(torch.ones(2, 3), "test")
    assert again.inputs.width == 3


def test_state_lists_only_what_was_gathered():
    assert set(PARTS["inputs alone"].state()) == {"sequences", "inputs.count"}
    assert set(Moments(second_moment(normal(4, 3)).without_gram(), Fisher()).state()) >= {"inputs.total"}
    assert not [key for key in PARTS["no gram"].state() if "gram" in key]


def test_states_of_processes_add_up():
    """In place, as a reduction over processes does it."""
    states = [pack(two_sites(seed)) for seed in (0, 5)]
    pointers = [tensor.data_ptr() for tensor in states[0].values() if tensor.dim()]
    assert len(set(pointers)) == len(pointers)
    for key, tensor in states[0].items():
        tensor += states[1][key]
    found, expected = unpack(states[0], {"gate": ("gate", "up")}), two_sites(0)
    merge(expected, two_sites(5))
    assert found["gate"].inputs is found["up"].inputs
    for name, entry in expected.items():
        same(found[name].inputs, entry.inputs)
        same(found[name].gradients, entry.gradients)
        close(found[name].fisher.rows, entry.fisher.rows, 1e-12)
        assert found[name].sequences == 2 * found[name].fisher.sequences == 4


def test_packed_groups_share_their_inputs_again():
    sites = two_sites(0)
    state = pack(sites)
    assert "gate:inputs.gram" in state
    assert "up:inputs.gram" not in state
    again = unpack(state, {"gate": ("gate", "up"), "down": ("down",)})
    assert set(again) == {"gate", "up"}
    assert equal(pack(again), state)


def test_state_of_moved_inputs_and_back():
    before, now = normal(9, 5), normal(9, 5, seed=1)
    moved = InputShift.empty(5, torch.device("cpu"))
    moved.update(before, now, "x")
    again = InputShift.from_state(moved.state())
    assert equal(again.state(), moved.state())
    assert again.count == 9
    weight = normal(3, 5).float()
    assert torch.equal(again.target(weight, centered=True), moved.target(weight, centered=True))


@pytest.mark.parametrize("centered", [False, True])
def test_target_of_wide_moved_inputs(centered):
    """Past the width from which sums and products come in blocks."""
    width = 2 * BLOCK + 300
    before, now, weight = normal(2000, width), normal(2000, width, seed=1) + 0.3, normal(4, width, seed=2)
    moved = InputShift.empty(width, torch.device("cpu"))
    moved.update(before, now, "x")
    x, y = (before - before.mean(0), now - now.mean(0)) if centered else (before, now)
    gram, cross = y.mT @ y / 2000, (x - y).mT @ y / 2000
    gram.diagonal().add_(3.0 * width / 2000 * gram.diagonal().mean())
    close(moved.target(weight, centered=centered), weight + weight @ cross @ torch.linalg.inv(gram), 1e-4)


# -- the loss ----------------------------------------------------------------------------------------


def causal_outputs(logits: Tensor, labels: Tensor) -> SimpleNamespace:
    """As a Hugging Face causal model answers `labels=`: it shifts them itself and takes the mean."""
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return SimpleNamespace(loss=loss, logits=logits)


def test_labeled_loss_is_a_sum_over_what_a_causal_model_scored():
    logits, labels = normal(2, 6, 11), torch.arange(12).reshape(2, 6) % 11
    labels[0, 4:] = -100  # padding on the right
    labels[1, 0] = -100  # a first token that is never scored anyway
    expected = sum(
        functional.cross_entropy(logits[row, i], labels[row, i + 1])
        for row in range(2)
        for i in range(5)
        if labels[row, i + 1] != -100
    )
    close(labeled_loss(causal_outputs(logits, labels), labels, shifted=True), expected, 1e-12)


def test_labeled_loss_of_a_head_that_does_not_shift():
    logits, labels = normal(4, 3), torch.tensor([0, 2, -100, 1])
    mean = SimpleNamespace(loss=functional.cross_entropy(logits, labels, ignore_index=-100))
    expected = functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    close(labeled_loss(mean, labels, shifted=False), expected, 1e-12)


def test_labeled_loss_of_a_regression_counts_examples():
    outputs, labels = normal(5), normal(5, seed=1)
    mean = SimpleNamespace(loss=functional.mse_loss(outputs, labels))
    close(labeled_loss(mean, labels, shifted=False), (outputs - labels).square().sum(), 1e-12)


def test_no_loss_for_labels_is_refused():
    with pytest.raises(DataError, match=r"labels: the model returned no loss.*curvature='sampled'"):
        labeled_loss(SimpleNamespace(logits=normal(2, 3)), torch.zeros(2), shifted=False)


def sure_of(tokens: Tensor, vocabulary: int = 13) -> Tensor:
    """Logits (B, T, V) that leave no doubt about the token at each place."""
    return 50.0 * functional.one_hot(tokens, vocabulary).float()


def sampled(logits: Tensor, mask: Tensor | None = None, seed: int = 0, first: int = 0) -> Tensor:
    masks = {} if mask is None else {mask.shape[1]: mask}
    examples = tuple(range(first, first + len(logits)))
    return sampled_loss(SimpleNamespace(logits=logits), masks, examples, seed)


def test_sampled_target_is_scored_against_the_logits_it_came_from():
    """Where the model is sure, what it draws is what it expects; any shift would cost 50 a token."""
    tokens = torch.randint(0, 13, (3, 8), generator=torch.Generator().manual_seed(0))
    assert float(sampled(sure_of(tokens))) < 1e-6
    assert float(sampled(sure_of(tokens).roll(1, dims=1))) < 1e-6


def test_sampled_gradient_is_probability_minus_one_hot_at_every_place():
    logits = normal(2, 5, 7, dtype=torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(sampled(logits), logits)
    drawn = logits.detach().softmax(-1) - gradient
    close(drawn, functional.one_hot(drawn.argmax(-1), 7).float(), 1e-5)


def test_sampled_gradients_average_to_the_true_fisher():
    logits = torch.tensor([0.5, -1.0, 0.2, 1.0]).expand(1, 4000, 4).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sampled(logits), logits)
    probability = logits[0, 0].detach().softmax(-1)
    fisher = torch.diag(probability) - torch.outer(probability, probability)
    close(gradient[0].mT @ gradient[0] / 4000, fisher, 0.1)


def test_padding_draws_no_gradient():
    logits = normal(2, 6, 5, dtype=torch.float32).requires_grad_()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = mask[1, 4:] = False
    (gradient,) = torch.autograd.grad(sampled(logits, mask), logits)
    assert torch.equal(gradient.abs().sum(-1) > 0, mask)


def test_draws_belong_to_examples():
    """Halving a batch or starting in the middle changes no draw; another seed changes them."""
    logits = normal(4, 6, 9, dtype=torch.float32)
    whole = sampled(logits)
    halves = sampled(logits[:2]) + sampled(logits[2:], first=2)
    close(halves, whole, 1e-6)
    assert float(sampled(logits, seed=1)) != float(whole)
    draws = {float(torch.rand(1, generator=generator(seed, example))) for seed in range(9) for example in range(9)}
    assert len(draws) == 81


FEATURES = {
    "last hidden state": lambda tensor: SimpleNamespace(last_hidden_state=tensor),
    "tuple": lambda tensor: (tensor,),
}


@pytest.mark.parametrize("outputs", FEATURES.values(), ids=FEATURES)
def test_features_are_dotted_with_normal_numbers(outputs):
    hidden = torch.zeros(3, 500, 4, requires_grad=True)
    mask = torch.ones(3, 500, dtype=torch.bool)
    mask[1, 100:] = False
    loss = sampled_loss(outputs(hidden), {500: mask}, (0, 1, 2), 0)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(gradient.abs().sum(-1) > 0, mask)
    drawn = gradient[mask]
    close(drawn.mT @ drawn / len(drawn), torch.eye(4), 0.15)


def test_pooled_features_take_the_place_of_hidden_states():
    hidden = normal(2, 5, 4, dtype=torch.float32).requires_grad_()
    outputs = SimpleNamespace(last_hidden_state=hidden)
    loss = sampled_loss(outputs, {}, (0, 1), 0, pooling=lambda outputs, mask: outputs.last_hidden_state[:, 0])
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient[:, 0].abs().min() > 0
    assert not gradient[:, 1:].any()


def test_question_answering_scores_both_ends():
    start, end = (normal(2, 9, seed=i, dtype=torch.float32).requires_grad_() for i in (0, 1))
    loss = sampled_loss(SimpleNamespace(start_logits=start, end_logits=end), {}, (0, 1), 0)
    for gradient in torch.autograd.grad(loss, (start, end)):
        assert (gradient < 0).sum(-1).tolist() == [1, 1]  # one drawn place each


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_heads_without_a_softmax(problem):
    logits = normal(200, 3, dtype=torch.float32).requires_grad_()
    loss = sampled_loss(SimpleNamespace(logits=logits), {}, range(200), 0, problem=problem)
    (gradient,) = torch.autograd.grad(loss, logits)
    if problem == "regression":
        assert float(gradient.std()) == pytest.approx(1, abs=0.1)
    else:
        drawn = logits.detach().sigmoid() - gradient
        close(drawn, drawn.round(), 1e-5)
        assert 0.3 < float(drawn.mean()) < 0.7


# -- gathering from a model --------------------------------------------------------------------------


class Batch:
    """Token numbers with a mask, as the data room makes them."""

    def __init__(self, ids: Tensor, mask: Tensor, first: int = 0) -> None:
        self.inputs = {"ids": ids}
        self.mask = mask
        self.examples = tuple(range(first, first + len(ids)))

    def masks(self) -> dict[int, Tensor]:
        return {self.mask.shape[1]: self.mask}


class Tiny(nn.Module):
    """Two projections that share an input, and one that reads their product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        self.gate = nn.Linear(8, 12)
        self.up = Conv1D(12, 8)
        self.down = nn.Linear(12, 8, bias=False)
        self.unused = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.down(self.gate(x).tanh() * self.up(x))


NAMES = ("gate", "up", "down", "unused")


def batches(parts: int = 1) -> list[Batch]:
    ids = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[1, 3:] = mask[4, :2] = False
    size = math.ceil(6 / parts)
    return [Batch(ids[i : i + size], mask[i : i + size], i) for i in range(0, 6, size)]


def groups_of(model: Tiny) -> dict[str, tuple[str, ...]]:
    return shared_inputs(model, NAMES, lambda: model(batches()[0].inputs["ids"]))


def gathered(model: Tiny, parts: int = 1, needs=("gram", "absolute", "gradients", "fisher")) -> dict[str, Moments]:
    def step(batch: Batch) -> Tensor:
        return model(batch.inputs["ids"])[batch.mask].square().sum()

    return gather(model, groups_of(model), batches(parts), step, needs=frozenset(needs))


def test_modules_on_one_tensor_form_a_group():
    assert groups_of(Tiny()) == {"gate": ("gate", "up"), "down": ("down",)}


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_gathered_moments_are_those_of_autograd(parts):
    """Token by token without padding; the Fisher by the gradient of the weight of each sequence."""
    model = Tiny()
    (whole,) = batches()
    moments = gathered(model, parts)
    assert set(moments) == {"gate", "up", "down"}
    assert moments["gate"].inputs is moments["up"].inputs
    x = model.embedding(whole.inputs["ids"]).detach()
    gate, up = model.gate(x).detach(), model.up(x).detach()
    inner = (gate.tanh() * up).requires_grad_()
    y = model.down(inner)
    (at_inner,) = torch.autograd.grad(y[whole.mask].square().sum(), inner)
    at_y = 2 * y.detach() * whole.mask[..., None]
    expected = {
        "gate": (x, at_inner * up * (1 - gate.tanh().square())),
        "up": (x, at_inner * gate.tanh()),
        "down": (inner.detach(), at_y),
    }
    for name, (inputs, gradients) in expected.items():
        found = moments[name]
        assert found.sequences == found.fisher.sequences == 6
        assert found.inputs.count == found.gradients.count == int(whole.mask.sum())
        same(found.inputs, second_moment(inputs[whole.mask]), 1e-5)
        rows = gradients[whole.mask]
        close(found.gradients.mean_gram, rows.mT @ rows / len(rows), 1e-5)
        masked = inputs * whole.mask[..., None]
        squared = per_sequence(masked, gradients * whole.mask[..., None])
        close(found.fisher.rows.float(), squared.sum(1), 1e-5)
        close(found.fisher.columns.float(), squared.sum(0), 1e-5)


def test_gathering_leaves_no_trace():
    model = Tiny()
    model.up.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with unchanged(*model.parameters()):
        gathered(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_when_a_batch_fails():
    model = Tiny()
    model.down.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="gradient of down, batch 0"):
        gathered(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("needs", [("gram",), ("absolute",), ("gradients",), ("fisher",)])
def test_only_what_is_needed_is_gathered(needs):
    moments = gathered(Tiny(), needs=needs)["down"]
    assert (moments.inputs.gram is not None) == ("gram" in needs)
    assert (moments.inputs.absolute is not None) == ("absolute" in needs)
    assert (moments.gradients is not None) == ("gradients" in needs)
    assert (moments.fisher is not None) == ("fisher" in needs)
    assert moments.inputs.count == 26


def test_same_bits_again():
    first, second = gathered(Tiny()), gathered(Tiny())
    for name, moments in first.items():
        assert torch.equal(moments.inputs.gram, second[name].inputs.gram)
        assert torch.equal(moments.gradients.gram, second[name].gradients.gram)
        assert torch.equal(moments.fisher.rows, second[name].fisher.rows)


def run_through(model: Tiny, gatherer: Gatherer, batch: Batch) -> None:
    model(batch.inputs["ids"])[batch.mask].square().sum().backward()


NEEDS = frozenset({"gram", "absolute", "gradients", "fisher"})


def agree(found: dict[str, Moments], expected: dict[str, Moments], tolerance: float = 1e-5) -> None:
    """Equal statistics: counts exactly, sums up to rounding."""
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        state, other = found[name].state(), entry.state()
        assert state.keys() == other.keys()
        for key, tensor in other.items():
            if tensor.dim() == 0:
                assert int(state[key]) == int(tensor), (name, key)
            elif not key.endswith("total"):
                close(state[key], tensor, tolerance)
        largest = float(entry.inputs.absolute.max())
        torch.testing.assert_close(found[name].inputs.total, entry.inputs.total, rtol=0, atol=tolerance * largest)


def test_gatherer_goes_on_with_statistics_that_are_there():
    model = Tiny()
    groups = groups_of(model)
    moments: dict[str, Moments] = {}
    for number, batch in enumerate(batches(3)):
        with Gatherer(model, groups, needs=NEEDS, into=moments) as gatherer:
            gatherer.begin(batch, number)
            run_through(model, gatherer, batch)
            gatherer.finish()
        if moments:
            assert all(gatherer.moments[name] is entry for name, entry in moments.items())
        moments = gatherer.moments
    assert moments["gate"].inputs is moments["up"].inputs
    agree(moments, gathered(model, 3))


def test_gatherer_adds_what_is_missing_to_statistics_that_are_there():
    model = Tiny()
    alone = Moments(SecondMoment(8, with_gram=False))
    with Gatherer(model, groups_of(model), needs=NEEDS, into={"up": alone}) as gatherer:
        assert gatherer.moments["up"] is alone
        assert gatherer.moments["gate"].inputs is alone.inputs
        gatherer.attempt(batches()[0], 0, lambda batch: run_through(model, gatherer, batch))
    agree(gatherer.moments, gathered(model))


def test_disarmed_hooks_do_nothing():
    model = Tiny()
    (batch,) = batches()
    plain = model(batch.inputs["ids"])
    with Gatherer(model, groups_of(model), needs=NEEDS) as gatherer:
        gatherer.armed = False
        gatherer.begin(batch, 0)
        with torch.no_grad():
            assert torch.equal(model(batch.inputs["ids"]), plain)
        assert not model(batch.inputs["ids"]).requires_grad
        gatherer.armed = True
        run_through(model, gatherer, batch)
        gatherer.armed = False
        gatherer.finish()
    agree(gatherer.moments, gathered(model))


def test_hooks_go_when_entering_fails():
    model = Tiny()
    gatherer = Gatherer(model, groups_of(model), needs=NEEDS)
    gatherer.groups = {"gate": ("gate", "up"), "gone": ("gone",)}
    with pytest.raises(AttributeError), gatherer:
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


# -- the order in which text comes -------------------------------------------------------------------


def sums_both_ways(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The Gram of many batches in their order, and of the odd ones after the even ones."""
    batches = [normal(40, width, seed=i).float() for i in range(24)]
    moments = []
    for order in (batches, batches[::2] + batches[1::2]):
        moment = SecondMoment(width)
        for rows in order:
            moment.update(rows, "x")
        moments.append(moment)
    return moments[0].mean_gram, moments[1].mean_gram


def test_the_order_of_batches_does_not_show_in_a_sum(monkeypatch):
    one, other = sums_both_ways(48)
    assert one.dtype == torch.float64
    close(one, other, 1e-14)
    monkeypatch.setattr("eckart.moments.accumulate.WIDE", 40)
    wide, moved = sums_both_ways(48)
    assert wide.dtype == torch.float32
    assert not torch.equal(wide, moved)
    close(wide, moved, 1e-5)
