"""KL with its gradient from one pass: the same as from torch's own operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.compression import divergence_loss
from eckart.compression.divergence_loss import DivergenceLoss


def plain(logits: Tensor, original: Tensor) -> Tensor:
    true, found = original.double().log_softmax(-1), logits.double().log_softmax(-1)
    return torch.where(true == -torch.inf, 0.0, true.exp() * (true - found)).sum(-1)


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("piece", [1, 33, 1 << 19])
def test_value_and_gradient(rows: int, piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(divergence_loss, "PIECE", piece)
    generator = torch.Generator().manual_seed(rows)
    logits = (4 * torch.randn(rows, 11, generator=generator)).requires_grad_()
    original, outer = torch.randn(rows, 11, generator=generator) * 4, torch.randn(rows, generator=generator)
    found, expected = DivergenceLoss.apply(logits, original), plain(logits, original)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value @ outer.to(value.dtype), logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_small_distances_are_not_lost_in_large_logits():
    original = 30 * torch.randn(50, 8192, generator=torch.Generator().manual_seed(1)) + 200
    logits = original + 1e-2 * torch.randn(50, 8192, generator=torch.Generator().manual_seed(2))
    expected = plain(logits, original)
    assert (DivergenceLoss.apply(logits, original) - expected).abs().mean() < 0.01 * expected.mean()


def test_classes_that_the_original_rules_out_cost_nothing():
    original = torch.tensor([[1.0, -torch.inf, 0.0], [0.0, 1.0, -torch.inf]])
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [1.0, 0.0, 5.0]], requires_grad=True)
    found = DivergenceLoss.apply(logits, original)
    torch.testing.assert_close(found.double(), plain(logits, original))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert bool(gradient.isfinite().all())
    assert float(gradient[0, 1]) == 0.0


def test_one_that_the_smaller_model_alone_rules_out_costs_all():
    logits, original = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])
    assert DivergenceLoss.apply(logits, original).item() == torch.inf


def test_the_gradient_has_the_type_of_the_logits():
    logits, original = torch.randn(4, 9, dtype=torch.bfloat16).requires_grad_(), torch.randn(4, 9)
    found = DivergenceLoss.apply(logits, original)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    exact = logits.detach().float().softmax(-1) - original.softmax(-1)
    torch.testing.assert_close(logits.grad.float(), exact, rtol=1e-2, atol=1e-3)
