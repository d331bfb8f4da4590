"""The order in which rows are trained on."""

import random

from eckart.recovery.training.sampling import ByLength

LENGTHS = random.Random(0).choices(range(3, 60), k=203)


def batches(sampler: ByLength) -> list[list[int]]:
    rows = list(sampler)
    return [rows[i : i + 8] for i in range(0, len(rows), 8)]


def padding(found: list[list[int]]) -> int:
    return sum(len(batch) * max(LENGTHS[i] for i in batch) - sum(LENGTHS[i] for i in batch) for batch in found)


def test_every_row_once_and_the_short_batch_last():
    sampler = ByLength(LENGTHS, 8, 0)
    assert sorted(sampler) == list(range(203))
    assert len(sampler) == 203
    assert list(map(len, batches(sampler))) == [8] * 25 + [3]


def test_little_padding_in_random_order():
    found = batches(ByLength(LENGTHS, 8, 0))
    shuffled = random.Random(1).sample(range(203), 203)
    assert padding(found) < 0.2 * padding([shuffled[i : i + 8] for i in range(0, 203, 8)])
    longest = [max(LENGTHS[i] for i in batch) for batch in found]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_the_order_depends_on_seed_and_epoch_alone():
    first, again, other = ByLength(LENGTHS, 8, 0), ByLength(LENGTHS, 8, 0), ByLength(LENGTHS, 8, 1)
    assert list(first) == list(first) == list(again) != list(other)
    again.set_epoch(1)
    assert list(again) != list(first)
    assert list(again) != list(other)
