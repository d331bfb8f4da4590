"""Hidden states that stay where they compute, in front of a store that keeps the rest."""

from __future__ import annotations

import sys

import pytest
import torch

from eckart.calibration.layerwise.near_states import NearStates
from eckart.storage.cache import Cache


def states(size: int, value: float) -> dict[str, torch.Tensor]:
    return {"0": torch.full((size,), float(value)), "1": torch.full((2,), float(value))}


@pytest.mark.parametrize("everything", [False, True])
def test_what_fits_stays_and_the_rest_goes_on(everything, tmp_path):
    far = Cache(sys.maxsize, tmp_path, durable=True)
    near = NearStates(far, 4 * 24, everything=everything)
    for place, size in enumerate((10, 10, 8)):
        near.put(f"a/{place}", states(size, place))
    assert far.keys() == (["a/0", "a/1", "a/2"] if everything else ["a/2"])
    assert near.memory == 0
    for place, size in enumerate((10, 10, 8)):
        assert near.has(f"a/{place}")
        found = near.get(f"a/{place}")
        assert list(found) == ["0", "1"]
        assert torch.equal(found["0"], states(size, place)["0"])
        found["0"].zero_()
        assert torch.equal(near.get(f"a/{place}")["0"], states(size, place)["0"])
    near.put("a/0", states(10, 7))  # in the room of what it replaces
    assert float(near.get("a/0")["0"][0]) == 7
    assert far.has("a/0") == everything
    near.drop("a/0")
    assert not near.has("a/0")
    assert not far.has("a/0")
    near.put("a/2", states(10, 8))  # from the other store into this one
    assert far.has("a/2") == everything
    assert float(near.get("a/2")["0"][0]) == 8
    with pytest.raises(KeyError):
        near.get("a/0")


def test_what_is_kept_is_a_copy():
    near = NearStates(Cache(0, None), 100)
    one = states(2, 1)
    near.put("a", one)
    one["0"].zero_()
    assert float(near.get("a")["0"][0]) == 1


def test_what_an_earlier_run_left_is_found(tmp_path):
    NearStates(Cache(0, tmp_path, durable=True), 10**6, everything=True).put("a", states(2, 1))
    near = NearStates(Cache(0, tmp_path, durable=True), 10**6, everything=True)
    assert near.has("a")
    assert float(near.get("a")["1"][0]) == 1
