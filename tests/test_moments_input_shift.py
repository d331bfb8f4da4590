"""The shift of a site's inputs between two models, and the weight that makes up for it."""

import pytest
import torch
from problems import close, normal

from eckart.moments.input_shift import InputShift
from eckart.moments.outer_products import BLOCK


def test_state_of_moved_inputs_and_back():
    before, now = normal(9, 5), normal(9, 5, seed=1)
    moved = InputShift.empty(5, torch.device("cpu"))
    moved.update(before, now)
    again = InputShift.from_state(moved.state())
    assert all(torch.equal(again.state()[key], value) for key, value in moved.state().items())
    assert again.count == 9
    weight = normal(3, 5).float()
    assert torch.equal(again.target(weight, centered=True), moved.target(weight, centered=True))


@pytest.mark.parametrize("centered", [False, True])
def test_target_of_wide_moved_inputs(centered):
    """Past the width from which sums and products come in blocks."""
    width = 2 * BLOCK + 300
    before, now, weight = normal(2000, width), normal(2000, width, seed=1) + 0.3, normal(4, width, seed=2)
    moved = InputShift.empty(width, torch.device("cpu"))
    moved.update(before, now)
    x, y = (before - before.mean(0), now - now.mean(0)) if centered else (before, now)
    gram, cross = y.mT @ y / 2000, (x - y).mT @ y / 2000
    gram.diagonal().add_(3.0 * width / 2000 * gram.diagonal().mean())
    close(moved.target(weight, centered=centered), weight + weight @ cross @ torch.linalg.inv(gram), 1e-4)
