"""What the pictures of a report show is what was measured: lengths, places, colors and signs."""

from __future__ import annotations

import re

import pytest
import reports

from eckart.report.page.bars import LONGEST, Bar, draw_bars
from eckart.report.page.bench import describe_bench
from eckart.report.page.blocks import Picture, Row
from eckart.report.page.common import change, list_steps, show_name, tile_of
from eckart.report.page.comparison import describe_comparison
from eckart.report.page.compression import list_latency, list_rivals
from eckart.report.page.heat import STEPS, draw_ranks, step_of
from eckart.report.page.scatter import Axis, Point, draw_scatter
from eckart.report.page.scores import describe_scores
from eckart.report.page.training import describe_tuning


def pictures_of(blocks):
    for block in blocks:
        yield from (
            pictures_of(block.blocks) if isinstance(block, Row) else ([block] if isinstance(block, Picture) else [])
        )


def bars_of(drawing):
    """Name and number of each bar -> per cent of the width."""
    found = re.findall(r'<rect [^>]*width="([\d.]+)%"[^>]*><title>(.*?)</title>', str(drawing))
    return {about: float(width) for width, about in found}


def test_the_models_of_a_compression_have_their_own_sizes_times_and_qualities():
    report = reports.compression()
    original, own, *rounded = list_rivals(report)
    model = report["sizes"]["model"]
    assert (original.sizes, original.seconds) == (model["before"], 0.02)
    assert set(original.quality.values()) == {0.0, 1.0}
    assert (own.sizes, own.seconds) == (model["after"], 0.016)
    assert own.quality["KL to the original"] == report["quality"]["agreement"]["kl"]
    assert [rival.name for rival in rounded] == ["original int8", "original int4"]
    assert [rival.quality for rival in rounded] == [row["quality"] for row in report["baselines"]]


def test_bars_are_as_long_as_their_numbers():
    drawn = draw_bars("t", "d", [Bar("one", 1.0), Bar("four", 4.0)], lambda value: f"{value:g}")
    assert bars_of(drawn) == {"one: 1": pytest.approx(25 * LONGEST), "four: 4": pytest.approx(100 * LONGEST)}


def test_bars_of_latency_are_medians():
    times = reports.latency()
    (picture,) = list_latency(times)
    assert set(bars_of(picture.drawing)) == {"original: 20 ms", "eckart: 16 ms"}
    assert [row[1] for row in picture.numbers.rows] == ["20", "16"]


def test_a_cell_of_the_heat_map_has_the_color_of_what_is_kept():
    heat = draw_ranks(reports.compression()["sites"])
    cells = dict(heat.rows)
    assert cells["q_proj"][0].step == step_of(0.5)
    assert cells["up_proj"][1].step == step_of(0.75)
    assert cells["down_proj"][1].step == step_of(1.0) == STEPS - 1
    assert [step_of(part) for part in (0.0, 0.05, 0.15, 0.99)] == [0, 0, 1, 9]


def test_nearer_to_the_original_is_up_and_smaller_is_left():
    points = [Point(1.0, 4.0, 0, about="near left"), Point(2.0, 1.0, 4, about="right up")]
    axis = Axis("a", str)
    drawn = str(draw_scatter("t", "d", points, axis, axis))
    found = re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)"[^>]*>.*?<title>(.*?)</title>', drawn)
    place = {about: (float(x), float(y)) for x, y, about in found}
    assert place["near left"][0] < place["right up"][0]
    assert place["near left"][1] > place["right up"][1]


def test_signs_and_shares_of_sizes():
    assert change(1.0, 2.0) == "−50.0%"
    assert change(3.0, 2.0) == "+50.0%"
    assert tile_of("bytes", 2e6, 1.5e6).share == 0.75
    assert tile_of("bytes", 2e6, 3e6).share == 1.0


def test_a_path_is_told_by_its_last_part():
    assert show_name("/home/someone/model") == "model"
    assert show_name("org/model") == "org/model"


def test_a_stage_that_was_not_kept_has_another_color():
    (picture, *_) = pictures_of(list_steps(reports.compression()))
    colors = re.findall(r'class="bar (s\d)"', str(picture.drawing))
    assert colors == ["s0", "s0", "s2"]


def test_the_model_that_was_kept_is_named():
    report = reports.tuning()
    assert describe_tuning(report, "it").summary.endswith("the model after it is published.")
    assert describe_tuning({**report, "kept": "before"}, "it").summary.endswith("the model before it was kept.")


def test_scores_stand_beside_those_of_the_original():
    assert "61.20 (original 58.90)" in describe_scores(reports.scores(), "it").summary


def test_a_benchmark_shows_what_was_allowed_and_where_the_time_goes():
    page = describe_bench(reports.bench(), "it")
    drawn = " ".join(str(picture.drawing) for section in page.sections for picture in pictures_of(section.blocks))
    assert "1.33× of 1.50" in drawn
    shares = [about for about in bars_of(drawn) if about.endswith("%")]
    assert shares == ["feed-forward: 70%", ": 70%", "norms: 30%", ": 30%"]


def test_the_best_models_are_named_from_large_to_small():
    summary = describe_comparison(reports.comparison(), "it").summary
    assert "for their bytes: original int8, drone at 0.4." in summary
    assert "for their latency: drone at 0.8, drone at 0.4." in summary
