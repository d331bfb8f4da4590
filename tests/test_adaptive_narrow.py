"""Rows and tokens taken out of what a block is called with, told by shapes alone."""

from __future__ import annotations

import pytest
import torch

from eckart.adaptive.narrow import Narrowing

B, T = 3, 5
ROWS = torch.tensor([0, 2])
TOKENS = torch.tensor([[0, 2, 4], [0, 3, -1]])


def numbered(*shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


@pytest.mark.parametrize("shape", [(B,), (B, T), (B, T, 4), (B, 1, 1, T), (B, 1, T, T), (B, 2, T, T), (B, 1)])
def test_rows_leave_every_tensor_that_counts_them(shape):
    tensor = numbered(*shape)
    assert torch.equal(Narrowing(B, T, ROWS).take(tensor), tensor[ROWS])


@pytest.mark.parametrize("shape", [(), (1, T), (1, T, 4), (1, 2, T, T), (7, 4), (B, 9)])
def test_what_counts_no_rows_is_left_by_rows(shape):
    tensor = numbered(*shape)
    assert Narrowing(B, T, ROWS).take(tensor) is tensor


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((B, T), (1,)), ((B, T, 4), (1,)), ((B, T, T), (1,)), ((B, 1, 1, T), (3,)), ((B, 2, T, T), (2, 3)),
     ((1, T), (1,)), ((1, T, 4), (1,)), ((1, 2, T, T), (2, 3)), ((1, 1, 1, T), (3,))],
)  # fmt: skip
def test_tokens_leave_row_by_row(shape, axes):
    tensor = numbered(*shape)
    tokens = TOKENS.clamp_min(0)  # every place holds one
    found = Narrowing(B, T, ROWS, tokens).take(tensor)
    for row, (number, kept) in enumerate(zip(ROWS, tokens, strict=True)):
        expected = tensor[0 if shape[0] == 1 else number]
        for axis in axes:
            expected = expected.index_select(axis - 1, kept)
        assert torch.equal(found[row], expected)


def test_distances_of_whole_numbers_have_two_axes_of_tokens():
    tensor = numbered(1, T, T, dtype=torch.long)
    found = Narrowing(B, T, ROWS, TOKENS.clamp_min(0)).take(tensor)
    assert torch.equal(found[1], tensor[0][[0, 3, 0]][:, [0, 3, 0]])


@pytest.mark.parametrize(
    ("tensor", "hidden"),
    [(torch.ones(B, T, dtype=torch.long), 0), (torch.ones(B, 1, 1, T, dtype=torch.bool), False),
     (torch.ones(B, 1, T, T, dtype=torch.bool), False), (torch.zeros(1, 2, T, T), torch.finfo(torch.float32).min),
     (torch.zeros(B, 1, 1, T), torch.finfo(torch.float32).min)],
)  # fmt: skip
def test_nothing_looks_at_a_place_that_holds_no_token(tensor, hidden):
    found = Narrowing(B, T, ROWS, TOKENS).take(tensor)
    assert bool((found[1, ..., 2] == hidden).all())
    assert not bool((found[0] == hidden).any())
    assert not bool((found[1, ..., :2] == hidden).any())


def test_arguments_keep_their_structure_and_the_stream_is_left():
    stream, mask, tables = numbered(2, 3, 4), torch.ones(B, 1, 1, T), (numbered(1, T, 4), numbered(B, T, 4))
    found = Narrowing(B, T, ROWS, TOKENS).take_all((stream, {"mask": mask, "tables": tables, "none": None}), stream)
    assert found[0] is stream
    assert found[1]["none"] is None
    assert found[1]["mask"].shape == (2, 1, 1, 3)
    assert [each.shape for each in found[1]["tables"]] == [(2, 3, 4)] * 2
    whole = (stream, mask)
    assert Narrowing(B, T).take_all(whole, stream) is whole
