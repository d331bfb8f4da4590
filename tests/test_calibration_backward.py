"""Models without gradients, labels that do not fit, and statistics of one's own, through whole runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import BY_NAME, Architecture
from torch import Tensor
from transformers import PreTrainedModel

import eckart
from eckart.calibration.backward_probe import why_no_backward
from eckart.errors import DataError, ModelError, UsageError
from eckart.linalg import Metric, Problem
from eckart.methods import METHODS
from eckart.moments import InputStatistic, Moments
from eckart.registry import STATISTICS

LLAMA: Architecture = BY_NAME["llama"]


class NoBackward(torch.autograd.Function):
    """Stands for a kernel without a backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("this kernel has no backward pass")


def without_backward() -> PreTrainedModel:
    model = LLAMA.model()
    model.model.norm.register_forward_hook(lambda module, args, output: NoBackward.apply(output))
    return model


def factors(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict(model.state_dict())


def test_compare_gathers_what_other_methods_need_where_no_backward_pass_runs():
    batches = LLAMA.batches()
    found = {
        method: result
        for method, _, result in eckart.compare(
            without_backward(), methods=["eckart", "asvd"], keeps=[0.6], data=batches
        )
    }
    assert found["eckart"].report["allocation"] == "uniform"
    assert any("no backward pass" in note and "drone" in note for note in found["eckart"].report["notes"])
    alone = eckart.compress(without_backward(), method="asvd", keep=0.6, data=batches)
    for name, tensor in factors(alone.model).items():
        assert torch.equal(factors(found["asvd"].model)[name], tensor)


@pytest.mark.parametrize("options", [{"method": "fwsvd"}, {"metric": "fwsvd"}])
def test_methods_that_need_gradients_are_refused_where_there_are_none(options):
    with pytest.raises(ModelError, match=r"no backward pass .*this kernel has no backward pass.* --method drone"):
        eckart.compress(without_backward(), keep=0.6, data=LLAMA.batches(), **options)
    with pytest.raises(ModelError, match="no backward pass"):
        list(eckart.compare(without_backward(), methods=["eckart", "fwsvd"], keeps=[0.6], data=LLAMA.batches()))


def test_labels_that_do_not_fit_are_an_error_of_the_default():
    kind = BY_NAME["bert-classes"]
    batches = kind.batches()
    for batch in batches:
        batch["labels"] = torch.full((len(batch["input_ids"]),), 99)
    with pytest.raises(DataError, match=r"labels: the model makes no loss of them \(IndexError: .*--curvature sampled"):
        eckart.compress(kind.model(), keep=0.6, data=batches)
    assert eckart.compress(kind.model(), keep=0.6, data=batches, curvature="sampled").report["allocation"] == "loss"


# -- what counts as "no gradients" ----------------------------------------------------------------------


def no_derivative() -> None:
    x = torch.ones(2, requires_grad=True)
    torch.igamma(x, torch.ones(2)).sum().backward()


def no_graph() -> None:
    torch.ones(2).sum().backward()


def no_custom_backward() -> None:
    NoBackward.apply(torch.ones(2, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("backward", [no_derivative, no_graph, no_custom_backward])
def test_autograd_says_that_there_are_no_gradients(backward):
    assert why_no_backward(backward, lambda: None, of_labels=False) is not None


def raises(error: Exception):
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "forward"),
    [
        (RuntimeError("the model's own"), raises(RuntimeError("the model's own"))),  # without gradients, too
        (KeyError("hidden"), lambda: None),
        (torch.OutOfMemoryError("CUDA out of memory"), lambda: None),
        (UsageError("numbers"), lambda: None),
    ],
)
def test_other_errors_of_the_probe_are_raised(error, forward):
    with pytest.raises(type(error)):
        why_no_backward(raises(error), forward, of_labels=False)


def test_a_backward_pass_that_runs_is_no_reason():
    assert why_no_backward(lambda: None, raises(KeyError("never called")), of_labels=True) is None


# -- a statistic of one's own ---------------------------------------------------------------------------


class Largest(InputStatistic):
    """`sum over batches of max |x|`, for each input."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    @classmethod
    def nbytes(cls, out_features: int, in_features: int) -> int:
        return 8 * in_features

    def update(self, rows: Tensor) -> None:
        largest = rows.abs().amax(0).double()
        self.total = largest if self.total is None else self.total + largest


def by_largest(weight: Tensor, moments: Moments) -> Problem:
    return Problem(weight, right=Metric(diagonal=moments["largest"].total))


@pytest.mark.parametrize("form", ["lowrank", "shared-basis"])
def test_a_method_reads_a_statistic_of_ones_own(form, monkeypatch):
    monkeypatch.setattr(STATISTICS, "_added", {})
    monkeypatch.setattr(METHODS, "_added", {})
    own = replace(METHODS["asvd"], name="largest", metric=by_largest, needs=frozenset({"largest"}))
    with pytest.raises(UsageError, match="statistic 'largest' is not known"):
        eckart.compress(LLAMA.model(), data=LLAMA.batches(), method=own, form=form, keep=0.6)
    STATISTICS.add("largest", Largest)
    result = eckart.compress(LLAMA.model(), data=LLAMA.batches(), method=own, form=form, keep=0.6)
    asvd = eckart.compress(LLAMA.model(), data=LLAMA.batches(), method="asvd", form=form, keep=0.6)
    assert result.plan.choices == asvd.plan.choices
    assert any(not torch.equal(tensor, factors(asvd.model)[name]) for name, tensor in factors(result.model).items())
