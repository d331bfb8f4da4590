"""Balancing and rotating the space between two factors."""

from __future__ import annotations

import pytest
import torch

from eckart.linalg import balance_for_rounding, balanced, flat_rotation


def drawn(m: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(m + k + n)
    scale = torch.logspace(2, -3, k, dtype=torch.float64)
    left = torch.randn(m, k, generator=stream, dtype=torch.float64) * scale
    return left, torch.randn(k, n, generator=stream, dtype=torch.float64) * scale[:, None]


@pytest.mark.parametrize(("m", "k", "n"), [(12, 5, 9), (4, 6, 9), (12, 7, 5), (3, 3, 3), (6, 1, 4)])
def test_the_product_stays_and_no_pair_of_factors_of_it_is_smaller(m, k, n):
    left, right = drawn(m, k, n)
    one, other = balanced(left, right)
    torch.testing.assert_close(one @ other, left @ right, rtol=1e-10, atol=1e-9)
    assert one.shape == left.shape
    assert other.shape == right.shape
    # ||B|| ||A|| is at least the nuclear norm of the product, whatever the factors.
    nuclear = torch.linalg.matrix_norm(left @ right, "nuc")
    torch.testing.assert_close(one.norm() * other.norm(), nuclear, rtol=1e-8, atol=0)
    torch.testing.assert_close(one.norm(), other.norm())


@pytest.mark.parametrize("size", [1, 2, 33])
def test_a_rotation_is_orthogonal_and_always_the_same(size):
    rotation = flat_rotation(size)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(size, dtype=torch.float64))
    assert torch.equal(rotation, flat_rotation(size))


def test_a_rotation_has_no_large_entry_and_has_random_signs():
    assert flat_rotation(50).abs().amax() <= (2 / 50) ** 0.5 + 1e-12
    first_row = flat_rotation(50)[0] * 50**0.5  # the signs alone
    assert 10 < int((first_row > 0).sum()) < 40


def test_rounding_ready_factors_of_a_group_hold_the_same_products_with_even_columns():
    left, right = drawn(40, 16, 30)
    lefts, shared = balance_for_rounding([left[:25].float(), left[25:].float()], right.float())
    torch.testing.assert_close(torch.cat(lefts) @ shared, left @ right, rtol=1e-4, atol=1e-2)
    assert [len(part) for part in lefts] == [25, 15]
    for sizes in (torch.cat(lefts).norm(dim=0), shared.norm(dim=1)):
        assert sizes.amax() < 3 * sizes.amin()  # before: a hundred thousand times
    assert lefts[0].dtype == shared.dtype == torch.float64
