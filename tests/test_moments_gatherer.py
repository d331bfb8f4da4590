"""Gathering statistics from a model: hooks that see real tokens only, each once, and leave no trace."""

from __future__ import annotations

import math

import pytest
import torch
from problems import close, unchanged
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.errors import NumericalError
from eckart.moments import Gatherer, InputStatistic, Moments, SequenceStatistic, gather, shared_inputs
from eckart.registry import STATISTICS

NEEDS = frozenset(STATISTICS)


def per_sequence(inputs: Tensor, gradients: Tensor) -> Tensor:
    """(m, n): the squared gradient of W of each sequence, summed."""
    return sum((g.mT @ x).square() for x, g in zip(inputs, gradients, strict=True))


class Batch:
    """Token numbers with a mask, as the data room makes them."""

    def __init__(self, ids: Tensor, mask: Tensor, first: int = 0) -> None:
        self.inputs = {"ids": ids}
        self.mask = mask
        self.examples = tuple(range(first, first + len(ids)))

    def masks(self) -> dict[int, Tensor]:
        return {self.mask.shape[1]: self.mask}

    def rows(self, start: int, stop: int) -> Batch:
        return Batch(self.inputs["ids"][start:stop], self.mask[start:stop], self.examples[start])


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


def gathered(model: Tiny, parts: int = 1, needs=NEEDS) -> dict[str, Moments]:
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
    for name, statistic in moments["gate"].statistics.items():
        assert (moments["up"][name] is statistic) == isinstance(statistic, InputStatistic), name
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
        found, rows = moments[name], inputs[whole.mask]
        assert found.sequences == found["fisher"].sequences == 6
        assert found.tokens == found["gram"].count == found["gradients"].count == int(whole.mask.sum())
        close(found["gram"].mean, rows.mT @ rows / len(rows), 1e-5)
        assert float((found.mean - rows.mean(0)).abs().max()) <= 1e-5 * float(rows.abs().max())
        close(found["absolute"].mean, rows.abs().mean(0), 1e-5)
        rows = gradients[whole.mask]
        close(found["gradients"].mean, rows.mT @ rows / len(rows), 1e-5)
        masked = inputs * whole.mask[..., None]
        squared = per_sequence(masked, gradients * whole.mask[..., None])
        close(found["fisher"].rows.float(), squared.sum(1), 1e-5)
        close(found["fisher"].columns.float(), squared.sum(0), 1e-5)


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


def test_values_that_are_not_finite_are_refused_at_the_end_of_their_batch():
    """The first site that saw them is named, whatever the model went on to say."""
    model, (batch,) = Tiny(), batches()

    def loss_is_refused(batch: Batch) -> None:
        run_through(model, gatherer, batch)
        raise NumericalError("the loss is nan")

    with Gatherer(model, groups_of(model), needs=NEEDS) as gatherer:
        gatherer.run_in_parts(batch, 6, lambda batch: run_through(model, gatherer, batch))
        with pytest.raises(NumericalError, match=r"^the loss is nan"):
            gatherer.run_in_parts(batch, 6, loss_is_refused)
        model.embedding.weight.data[batch.inputs["ids"][0, 0], 3] = float("inf")
        for run in (lambda batch: run_through(model, gatherer, batch), loss_is_refused):
            with pytest.raises(
                NumericalError, match=r"^input of gate, batch 7: there are values that are NaN.*bfloat16"
            ):
                gatherer.run_in_parts(batch, 7, run)


def test_what_was_added_before_memory_ran_out_is_looked_at_too():
    """Its halves do not add it again."""
    model, (batch,) = Tiny(), batches()
    model.embedding.weight.data[batch.inputs["ids"][0, 0], 3] = float("nan")

    def run(part: Batch) -> None:
        if len(part.examples) == 6:
            model.gate(model.embedding(part.inputs["ids"]))
            raise MemoryError

    with (
        Gatherer(model, groups_of(model), needs=NEEDS) as gatherer,
        pytest.raises(NumericalError, match=r"^input of gate, batch 3"),
    ):
        gatherer.run_in_parts(batch, 3, run)


def test_a_pass_looks_once_whether_all_was_finite(monkeypatch):
    """Each look makes the host wait for a device."""
    model, (batch,) = Tiny(), batches()
    looks = []
    plain = Tensor.__bool__
    monkeypatch.setattr(Tensor, "__bool__", lambda tensor: looks.append(tuple(tensor.shape)) or plain(tensor))
    with Gatherer(model, groups_of(model), needs=frozenset({"gram", "gradients"})) as gatherer:
        model(batch.inputs["ids"])
        looks.clear()
        gatherer.start(batch, 0)
        run_through(model, gatherer, batch)
        masks = len(looks)
        gatherer.finish()
    assert len(looks) == masks + 1


@pytest.mark.parametrize("name", STATISTICS)
def test_only_what_is_needed_is_gathered(name):
    moments = gathered(Tiny(), needs=[name])["down"]
    assert set(moments.statistics) == {"mean", name}
    assert not moments[name].is_zero
    assert moments.tokens == 26


def test_gathering_again_gives_the_same_bits():
    first, second = gathered(Tiny()), gathered(Tiny())
    for name, moments in first.items():
        state = second[name].state()
        assert all(torch.equal(state[key], value) for key, value in moments.state().items())


class TokenSquares(SequenceStatistic):
    """Of one's own: `sum over tokens |x|^2 |g|^2`, a number."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None

    @classmethod
    def nbytes(cls, out_features: int, in_features: int) -> int:
        return 8

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        squares = (inputs.square().sum(-1) * gradients.square().sum(-1)).sum().double()[None]
        self.squares = squares if self.squares is None else self.squares + squares


def test_a_statistic_of_ones_own_is_gathered_under_its_name(monkeypatch):
    monkeypatch.setattr(STATISTICS, "_added", {})
    STATISTICS.add("token-squares", TokenSquares)
    for name, moments in gathered(Tiny(), 3, needs=["token-squares", "gradients"]).items():
        assert not moments["token-squares"].is_zero
        if name == "down":  # its gradient is 2 y, and the statistic is that of whole sequences
            model, (whole,) = Tiny(), batches()
            x = model.embedding(whole.inputs["ids"])
            x = model.gate(x).tanh() * model.up(x)
            y = model.down(x)
            expected = (x.square().sum(-1) * 4 * y.square().sum(-1))[whole.mask].sum()
            close(moments["token-squares"].squares[0].float(), expected, 1e-5)
        again = Moments.from_state(moments.state())
        assert torch.equal(again["token-squares"].squares, moments["token-squares"].squares)


def run_through(model: Tiny, gatherer: Gatherer, batch: Batch) -> None:
    model(batch.inputs["ids"])[batch.mask].square().sum().backward()


def agree(found: dict[str, Moments], expected: dict[str, Moments], tolerance: float = 1e-5) -> None:
    """Equal statistics: counts exactly, sums up to rounding."""
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        state, other = found[name].state(), entry.state()
        assert state.keys() == other.keys()
        for key, tensor in other.items():
            if tensor.dim() == 0:
                assert int(state[key]) == int(tensor), (name, key)
            elif key != "mean.total":
                close(state[key], tensor, tolerance)
        largest = float(entry["absolute"].total.max())
        torch.testing.assert_close(found[name]["mean"].total, entry["mean"].total, rtol=0, atol=tolerance * largest)


def test_gatherer_adds_to_given_statistics():
    model = Tiny()
    groups = groups_of(model)
    moments: dict[str, Moments] = {}
    for number, batch in enumerate(batches(3)):
        with Gatherer(model, groups, needs=NEEDS, into=moments) as gatherer:
            gatherer.start(batch, number)
            run_through(model, gatherer, batch)
            gatherer.finish()
        if moments:
            assert all(gatherer.moments[name] is entry for name, entry in moments.items())
        moments = gatherer.moments
    assert moments["gate"]["gram"] is moments["up"]["gram"]
    agree(moments, gathered(model, 3))


def test_gatherer_makes_statistics_that_are_missing():
    model = Tiny()
    alone = Moments.empty({"absolute"})
    with Gatherer(model, groups_of(model), needs=NEEDS, into={"up": alone}) as gatherer:
        assert gatherer.moments["up"] is alone
        assert gatherer.moments["gate"]["absolute"] is alone["absolute"]
        assert gatherer.moments["gate"]["gram"] is alone["gram"]
        gatherer.run_in_parts(batches()[0], 0, lambda batch: run_through(model, gatherer, batch))
    agree(gatherer.moments, gathered(model))


def test_paused_hooks_do_nothing():
    model = Tiny()
    (batch,) = batches()
    plain = model(batch.inputs["ids"])
    with Gatherer(model, groups_of(model), needs=NEEDS) as gatherer:
        gatherer.paused = True
        gatherer.start(batch, 0)
        with torch.no_grad():
            assert torch.equal(model(batch.inputs["ids"]), plain)
        assert not model(batch.inputs["ids"]).requires_grad
        gatherer.paused = False
        run_through(model, gatherer, batch)
        gatherer.paused = True
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
