"""The loss whose gradients weigh outputs: with labels, and with targets drawn from the model."""

from types import SimpleNamespace

import pytest
import torch
from problems import close, normal
from torch import Tensor
from torch.nn import functional

from eckart.errors import DataError
from eckart.moments import generator, labeled_loss, sampled_loss


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
