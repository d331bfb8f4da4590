"""Which steps of a text are held out: one of eight, spread over it, and no more than are needed."""

from __future__ import annotations

import pytest
import torch
from architectures import BY_NAME

import eckart
from eckart.compression.training_text import MOST_HELD, TrainingText
from eckart.data import load_data
from eckart.distributed import Processes


@pytest.mark.parametrize(("rows", "expected"), [(2, 1), (24, 3), (96, MOST_HELD), (400, MOST_HELD)])
def test_how_much_is_held_out(rows: int, expected: int):
    data = load_data([{"input_ids": torch.ones(4, 1024, dtype=torch.int64)} for _ in range(rows // 4 or 1)])
    text = TrainingText.of([batch.rows(0, min(4, rows)) for batch in data.batches], Processes())
    assert text is not None
    assert len(text.held) + len(text.steps) == rows
    assert expected - 1 <= len(text.held) <= expected
    assert not set(text.held) & set(text.steps)
    places = [examples[0] for examples in text.held]
    assert rows < 24 or (max(places) > 0.8 * rows and min(places) < 0.2 * rows)


def test_models_that_read_no_tokens_are_trained_too():
    architecture, told = BY_NAME["vit"], []
    result = eckart.compress(
        architecture.model(), data=architecture.batches(4, 6), method="drone", keep=0.5, refit=False, effort="best",
        report_progress=told.append,
    )  # fmt: skip
    assert [stage["stage"] for stage in result.report["stages"]] == ["factors", "refinement"]
    assert any(line.startswith("refinement: ") and "about 8 times" in line for line in told)
