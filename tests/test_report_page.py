"""The HTML report: well-formed, accessible, whole, escaped; what it says is what the report holds."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser

import pytest
import reports
import torch
from typer.testing import CliRunner

import eckart
from eckart.cli.app import app
from eckart.errors import UsageError
from eckart.report.page.common import Rival, judge_rounding
from eckart.report.page.comparison import list_compared
from eckart.report.page.heat import draw_ranks, layer_of
from eckart.report.page.pages import check_page_file, render_report, write_page
from eckart.report.page.render import MARK
from eckart.report.page.scatter import Axis, Point, draw_scatter, find_best
from eckart.report.page.spectra import Spectrum
from eckart.report.page.svg import color_of, free_series, round_ladder, round_ticks, shape_of
from eckart.storage.manifest import find_changes, not_published

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
SPECTRUM = Spectrum(
    "model.layers.0.q_proj", "lowrank", 4, [5.0, 2.0, 1.0, 0.5] + [0.0] * 12, [1 / n for n in range(1, 17)]
)


class Document(HTMLParser):
    """Elements with their attributes and the words inside; complains of tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[dict] = []
        self._open: list[dict] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open[-1]['tag']}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        node = {"tag": tag, "words": "", "in": [n["tag"] for n in self._open], **dict(attrs)}
        self.found.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open, f"closed, but not open: {tag}"
        assert self._open[-1]["tag"] == tag, f"{tag} closes {self._open[-1]['tag']}"
        self._open.pop()

    def handle_data(self, data):
        for node in self._open:
            node["words"] += data

    def all(self, *tags: str) -> list[dict]:
        return [node for node in self.found if node["tag"] in tags]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """The page of every command, by its name; that of a compression with all that can be added."""
    drawn = {name: render_report(make(), f"{name} {reports.NASTY}") for name, make in reports.ALL.items()}
    drawn["compression"] = render_report(
        reports.compression(), reports.NASTY, loading=f'model = load("{reports.NASTY}")', again="eckart compress",
        scores=reports.scores(), spectra=[SPECTRUM],
    )  # fmt: skip
    return drawn


@pytest.mark.parametrize("name", reports.ALL)
def test_page_is_whole_and_accessible(pages, name):
    text = pages[name]
    page = Document(text)
    assert not re.findall(r"(?:src|href)=\"(?!#|data:,\")[^\"]*", text)
    assert "url(" not in text
    assert "@import" not in text
    assert not page.all("script", "iframe", "object", "img")
    assert not [key for node in page.found for key in node if key.startswith("on") and key != "one"]
    assert [node.get("lang") for node in page.all("html")] == ["en"]
    assert page.all("title")[0]["words"].strip()
    ids = [node["id"] for node in page.found if "id" in node]
    assert len(ids) == len(set(ids))
    for node in page.all("a"):
        assert node["href"].removeprefix("#") in ids
        assert node["words"].strip()
    for node in page.found:
        assert node.get("aria-labelledby", "content") in ids
    levels = [int(node["tag"][1]) for node in page.all("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer")] == [1, 1, 1, 1]
    for node in page.all("svg"):
        named = node.get("role") == "img" and node.get("aria-label", "").strip()
        assert named or node.get("aria-hidden") == "true" or "svg" in node["in"]
    for node in page.all("th"):
        assert node["scope"] in ("col", "row")
        assert node["words"].strip()
    for node in page.all("table"):
        assert "div" in node["in"]
    assert len(page.all("caption")) == len(page.all("table"))
    assert len(page.all("summary")) == len(page.all("details"))
    assert all(node["words"].strip() for node in page.all("summary"))
    for node in page.found:  # what scrolls is reached by the keyboard, and has a name
        if node.get("class") == "scroll" or node["tag"] == "pre":
            assert (node["tabindex"], node["role"]) == ("0", "region")
            assert node["aria-label"]


@pytest.mark.parametrize("name", reports.ALL)
def test_what_a_checkpoint_says_is_text(pages, name):
    text = pages[name]
    assert "<script" not in text
    assert "&lt;script&gt;alert(" in text
    assert "nan" not in re.findall(r'(?:x|y|x1|x2|y1|y2|width|height|cx|cy)="([^"]*)"', text)
    assert not re.findall(r'(?:x|y|x1|x2|y1|y2|width|height|cx|cy)="[^"]*(?:nan|inf)', text)
    assert "/home/someone" not in text  # it may be published


def test_every_part_of_a_compression_is_told(pages):
    page = Document(pages["compression"])
    headings = [node["words"] for node in page.all("h2")]
    assert headings == [
        "Quality before and after", "Scores", "What was asked", "Sizes", "Where the budget went",
        "Predicted and measured error by layer", "Spectra", "Speed", "What each stage brought",
        "Warnings and fallbacks", "How to load it",
    ]  # fmt: skip
    words = page.all("main")[0]["words"]
    for told in (
        "1.40 M", "2.80 MB", "−30.0%", "0.0234", "89.0%", "1.25×", "16 ms", "0.6 of the numbers", "a note on", "25%",
        "one window is short", "1 × no tokens", "output head, left alone", "model.layers.1.down_proj", "refit", "61.20",
        "63.00", "int4", "0.0345, not kept",
    ):  # fmt: skip
        assert told in words, told
    heat = next(node for node in page.all("table") if node.get("class") == "heat")
    assert [node["words"] for node in page.all("td") if "class" in node and node["class"].startswith("h")] == [
        "4", "4", "6", "6", "full"
    ]  # fmt: skip
    assert "in model.layers.*" in heat["words"]


def test_a_report_without_data_or_stages_is_shown_too():
    bare = reports.compression(quality=None, data=None, curvature="none", latency=None, curves=None, stages=None,
                               notes=[], seconds={}, skipped={})  # fmt: skip
    bare.pop("baselines")
    bare["sites"] = [{k: v for k, v in site.items() if k not in ("predicted_loss", "effective_rank", "left_dense")}
                     for site in bare["sites"]]  # fmt: skip
    words = Document(render_report(bare, "bare")).all("main")[0]["words"]
    assert "everything was done as it was asked for" in words
    assert "eckart eval" in words
    assert "by layer" not in words.replace("by layer and kind", "")
    assert "exp of the entropy" not in words
    assert "`eckart bench DIR --against MODEL`" in words


def test_heading_of_the_errors_says_what_is_there():
    words = Document(render_report(reports.compression(curves=None), "x")).all("h2")
    assert "Predicted error by layer" in [node["words"] for node in words]


def test_what_numbers_mean_is_said_beside_them():
    causal = reports.compression(baselines=None)
    causal["data"]["kind"] = "causal"
    causal["quality"]["agreement"]["standard_error"] = 0.0042
    words = Document(render_report(causal, "x")).all("main")[0]["words"]
    for told in (
        "exp(KL) = 1.02 times", "`eckart eval DIR --against MODEL --data FILE`", "Standard error of KL to the original",
        "0.0042", "rounded to int8 and int4 is not beside it", "kept: whether the run went on",
        "weighted effective rank: exp of the entropy", "column –", "kept of the sites",
    ):  # fmt: skip
        assert (told in words) == (told != "column –"), told
    plain = Document(render_report(reports.compression(), "x")).all("main")[0]["words"]
    for told in ("exp(KL)", "Standard error", "is not beside it", "No time was taken"):
        assert told not in plain, told


def test_layers_that_lose_neurons_say_so():
    found = reports.compression()
    sliced = reports.site(0, "down_proj", 20, form="sliced", full_rank=64)
    pooler = reports.site(0, "q", 4) | {"site": "pooler", "kind": "pooler"}
    found["sites"] += [sliced, pooler]
    words = Document(render_report(found, "x")).all("main")[0]["words"]
    for told in (
        "Rank of every weight, or neurons kept",
        "rank or neurons: a weight of form sliced",
        "column –: outside",
    ):
        assert told in words, told
    cells = [cell for _, row in draw_ranks(found["sites"]).rows for cell in row]
    assert [cell.about for cell in cells if "neurons" in cell.about] == [
        "model.layers.0.down_proj: sliced, neurons 20 of 64, 250% of its numbers"
    ]
    assert draw_ranks([sliced]).caption.startswith("Neurons kept in every layer that loses some, by layer")
    assert draw_ranks(reports.compression()["sites"]).caption.startswith("Rank of every weight, by layer")


def test_numbers_that_are_not_finite_are_words():
    wild = reports.compression()
    wild["quality"]["agreement"]["kl"] = float("inf")
    wild["curves"][0]["measured"] = float("nan")
    wild["sites"][0]["predicted_loss"] = float("nan")
    text = render_report(wild, "wild")
    Document(text)
    assert ">inf<" in text


def test_the_choice_is_what_no_other_beats(pages):
    page = Document(pages["comparison"])
    assert "Choose among these" in page.all("table")[0]["words"]
    rows = re.findall(r'<th scope="row">([^<]*)</th>', pages["comparison"].split("</table>")[0])
    # svd is further away at every size. int8 is smaller and nearer than drone at 0.8, which is faster.
    assert rows == ["drone at 0.4", "original int8", "drone at 0.8", "original"]
    assert re.findall(r'<td class="words">([^<]*)</td>', pages["comparison"].split("</table>")[0]) == [
        "bytes and latency", "bytes", "latency", "bytes and latency",
    ]  # fmt: skip
    assert len([node for node in page.all("svg") if node.get("role") == "img"]) == 2  # bytes, latency


def test_milliseconds_of_a_comparison_hold_each_against_its_own_original():
    """A machine that was busy while one row was timed slowed its original too."""
    found = reports.comparison()
    found["rows"][0]["latency"] = reports.latency(before=0.2, after=0.1)
    seconds = {rival.name: rival.seconds for rival in list_compared(found)}
    assert seconds["svd at 0.8"] == pytest.approx(0.01)
    assert seconds["original"] == pytest.approx(0.02)
    assert seconds["original int8"] == pytest.approx(0.03)


def test_best_points():
    points = [Point(3, 0.0, 0), Point(1, 0.5, 0), Point(2, 0.6, 0), Point(1, 0.7, 0), Point(2, 0.1, 0)]
    assert [(point.x, point.y) for point in find_best(points)] == [(1, 0.5), (2, 0.1), (3, 0.0)]


def test_words_beside_points_do_not_overlap_on_a_phone():
    crowd = [Point(1 + n % 3 / 50, 0.1 + n / 400, n, f"method {n}") for n in range(12)]
    drawn = str(draw_scatter("t", "d", crowd, Axis("x", str), Axis("y", str)))
    places = [
        (float(x), float(y) + float(dy), float(dx), anchor, words)
        for x, y, dx, dy, anchor, words in re.findall(
            r'<text x="([\d.]+)%" y="([-\d.]+)" dx="([-\d.]+)" dy="([-\d.]+)" text-anchor="(\w+)" class="label">(.*?)<',
            drawn,
        )
    ]
    assert 2 <= len(places) < len(crowd)
    boxes = []
    for x, y, dx, anchor, words in places:
        width = 6.6 * len(words)
        left = 290 * x / 100 + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, y - 11, left + width, y + 4))
    for place, one in enumerate(boxes):
        for other in boxes[:place]:
            assert not (one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])


def test_series_are_told_apart():
    numbers = [1, 3, *(free_series(place) for place in range(12))]
    assert len({(color_of(number), shape_of(number)) for number in numbers}) == len(numbers)


@pytest.mark.parametrize("largest", [1e-7, 0.3, 1.0, 7.0, 99.0, 12345.0])
def test_ticks_reach_the_largest(largest):
    ticks = round_ticks(largest)
    assert ticks[-2] < largest <= ticks[-1] * (1 + 1e-9)
    assert 4 <= len(ticks) <= 7


def test_colors_can_be_read():
    """Text on each color of a heat map, and the page's words, lines and links: 4.5 to 1 at least, light and dark."""
    from importlib.resources import files

    css = files("eckart.report.page").joinpath("page.css").read_text()
    cells = re.findall(r"\.h\d \{ background: (#\w{6}); color: (#\w{3,6})", css)
    assert len(cells) == 20
    modes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in css.split("@media (prefers-color-scheme: dark)")[:2]
    ]
    pairs = [*cells]
    for mode in modes:
        pairs += [(mode[back], mode[ink]) for back in ("page", "card") for ink in ("ink", "soft", "accent")]
        pairs.append((mode["warn-back"], mode["ink"]))
    for back, ink in pairs:
        assert contrast(back, ink) >= 4.5, (back, ink)
    for mode in modes:  # marks and bars
        assert all(contrast(mode["card"], mode[f"s{n}"]) >= 3 for n in range(6))


def contrast(one: str, other: str) -> float:
    """Of WCAG 2."""

    def light(color: str) -> float:
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("largest", [1e-7, 0.004, 0.0157, 0.06, 0.3, 1.0, 2.1, 12345.0])
def test_ticks_of_a_square_root_scale_are_round_and_apart(largest):
    ticks = round_ladder(largest)
    assert ticks[0] == 0
    assert len(ticks) >= 4
    assert ticks[-1] <= largest * (1 + 1e-9)
    assert all(f"{value:.6e}"[0] in "125" and float(f"{value:.0e}") == pytest.approx(value) for value in ticks[1:])
    places = [(value / largest) ** 0.5 for value in ticks]
    assert min(after - before for before, after in itertools.pairwise(places)) >= 0.15 - 1e-9
    assert places[1] < 0.46
    assert places[-1] > 0.7


def test_scale_of_the_quality_picture_is_named(pages):
    text = pages["compression"]
    assert "KL to the original (square-root scale)" in text
    assert "Heights are by the square root" in text
    ticks = re.findall(r'text-anchor="end" class="tick">([\d.e-]+)<', text.split("Quality against latency")[0])
    assert ticks[:5] == ["0", "0.002", "0.005", "0.01", "0.02"]


def test_rounding_that_is_better_is_said():
    own = Rival("this model", reports.sizes(100), {"KL to the original": 0.1})
    small = Rival("original int4", reports.sizes(100, 1), {"KL to the original": 0.05}, series=1)
    worse = Rival("original int8", reports.sizes(100, 1), {"KL to the original": 0.2}, series=1)
    verdict = judge_rounding([own, small, worse], own)
    assert "original int4 is the better choice" in verdict
    assert "`--quantize int8`" in verdict
    assert "--quantize" not in judge_rounding([own, small, worse], own, rounded=True)
    assert judge_rounding([own, worse], own) is None
    found = reports.compression()
    found["quality"]["agreement"]["kl"] = 0.5  # further than the rounded originals, which are smaller
    before = {"size": found["sizes"]["model"]["after"], "quality": found["quality"]}
    for rounding, advised in ((None, True), ({"kind": "int8", "layers": 3, "left": {}, "before": before}, False)):
        page = render_report(found | ({"quantization": rounding} if rounding else {}), "x")
        assert "is the better choice" in page
        assert ("compress with `--quantize int8`" in page) == advised


def test_layers_and_cells_of_the_heat_map():
    assert [layer_of(name) for name in ("h.11.attn", "encoder.layer.2.x", "pooler.dense", "3.x")] == [11, 2, None, 3]
    kind = {"kind": "model.layers.*.experts.*.up"}
    experts = [reports.site(0, f"experts.{number}.up", rank) | kind for number, rank in ((0, 2), (1, 6))]
    pooler = reports.site(1, "q", 4) | {"site": "pooler", "kind": "pooler"}
    drawn = draw_ranks([*experts, reports.site(0, "q", 16), pooler])
    assert drawn.columns == ["0", "–"]
    assert {name: [(cell.text, cell.step) for cell in row] for name, row in drawn.rows} == {
        "experts.*.up": [("2-6", 5), ("", None)],
        "q": [("full", 9), ("", None)],
        "pooler": [("", None), ("4", 5)],
    }


@pytest.mark.parametrize("broken", [{}, {"rows": [], "original": 3}, {"sites": [], "kept": {}}, {"kind": "tune"}])
def test_what_is_no_report_is_refused(broken):
    with pytest.raises(UsageError, match="not a whole report"):
        render_report(broken, "x")


def test_only_pages_of_eckart_are_replaced(tmp_path):
    page, other = tmp_path / "a.html", tmp_path / "b.html"
    write_page(page, f"<!DOCTYPE html>\n<!-- {MARK} -->")
    write_page(page, f"<!DOCTYPE html>\n<!-- {MARK} -->again")
    assert page.read_text().endswith("again")
    other.write_text("mine")
    with pytest.raises(UsageError, match="not written by eckart"):
        check_page_file(other)
    with pytest.raises(UsageError, match="no folder"):
        check_page_file(tmp_path / "no" / "a.html")
    with pytest.raises(UsageError, match="is a folder"):
        check_page_file(tmp_path)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny Llama, compressed without data."""
    from tiny import llama, place

    home = tmp_path_factory.mktemp("page")
    source = place(llama(), home / "llama")
    eckart.compress(source, method="svd", keep=0.6, output_dir=home / "small")
    return home / "small"


def run(*words):
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_published_folder_holds_its_page_and_it_is_drawn_again(published):
    page = published / "eckart" / "report.html"
    first = page.read_text()
    assert "AutoModelForCausalLM.from_pretrained(&#34;small&#34;)" in first
    assert "Spectra</h2>" not in first
    done = run(published, "--spectra", "*.0.*q_proj", "--spectra", "model.layers.1.mlp.up_proj")
    assert done.exit_code == 0, done.output
    again = page.read_text()
    assert "Spectra</h2>" in again
    assert "from_pretrained(&#34;small&#34;)" in again
    assert again.count("Spectrum of ") == 2
    assert "Spectrum of model.layers.0.self_attn.q_proj" in again
    rank = json.loads((published / "eckart" / "report.json").read_text())["sites"][0]["rank"]
    assert f">rank {rank}<" in again
    assert find_changes(published)[1] == []  # the page counts as published
    assert not_published(published) is None


def test_spectra_are_those_of_the_weights(published):
    from safetensors.torch import load_file

    from eckart.report.page.read_spectra import read_spectra

    report = json.loads((published / "eckart" / "report.json").read_text())
    (found,) = read_spectra(published, report, ["0.self_attn.k_proj"])
    weight = load_file(published.parent / "llama" / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    expected = torch.linalg.svdvals(weight.float()).tolist()
    assert found.original == pytest.approx(expected, rel=1e-4)
    assert found.values[: found.rank] == pytest.approx(expected[: found.rank], rel=0.02)
    assert max(found.values[found.rank :]) < 0.02 * expected[0]
    with pytest.raises(UsageError, match="no weight has such a name"):
        read_spectra(published, report, ["q_proj", "nothing"])


def test_command_draws_files_of_json_and_refuses_the_rest(published, tmp_path):
    for name, make in (("c", reports.comparison), ("b", reports.bench)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"written_by": "eckart", **make()}))
    (tmp_path / "other.json").write_text("{}")
    assert run(tmp_path / "c.json", "--output", tmp_path / "x.html").exit_code == 0
    assert "What to choose" in (tmp_path / "x.html").read_text()
    assert run(tmp_path).exit_code == 0
    assert {path.name for path in tmp_path.glob("*.html")} == {"x.html", "c.html", "b.html"}
    (tmp_path / "b.html").write_text("mine")
    for words, told in (
        ([tmp_path / "b.json"], "not written by eckart"),
        ([tmp_path, "--output", tmp_path / "y.html"], "holds 2 reports"),
        ([tmp_path / "c.json", "--spectra", "x"], "belong to a published folder"),
        ([tmp_path / "nothing"], "there is no report"),
        ([tmp_path / "other.json"], "not a whole report"),
    ):
        done = run(*words)
        assert done.exit_code == 2, done.output
        assert told in " ".join(done.output.split())
    assert (tmp_path / "b.html").read_text() == "mine"
    scored = tmp_path / "s.json"
    scored.write_text(json.dumps({"written_by": "eckart", **reports.scores()}))
    assert run(published, "--scores", scored, "--output", tmp_path / "z.html").exit_code == 0
    assert "61.20" in (tmp_path / "z.html").read_text()


def test_a_page_that_fails_costs_no_run(published, monkeypatch, tmp_path, caplog):
    from tiny import llama

    monkeypatch.setattr("eckart.report.page.pages.render_page", lambda *_: 1 / 0)
    result = eckart.compress(llama(), method="svd", keep=0.6, output_dir=tmp_path / "out")
    assert result.folder is not None
    assert not (result.folder / "eckart" / "report.html").exists()
    assert "no report.html is written" in caplog.text


def test_the_original_in_few_bits_stands_beside(published, measures_baselines, tmp_path):
    """int8 and int4 of the original, on the same held-out text, in the report, its page, and a comparison."""
    from tiny import text

    source, data = published.parent / "llama", text(tmp_path)
    small = {"num_samples": 8, "max_seq_length": 16}
    report = eckart.compress(source, output_dir=tmp_path / "out", method="svd", keep=0.5, data=data, **small).report
    eight, four = report["baselines"]
    assert (eight["name"], four["name"]) == ("original int8", "original int4")
    assert 0 < eight["quality"]["KL to the original"] < four["quality"]["KL to the original"]
    scored = eckart.evaluate(tmp_path / "out", source, data=data, latency=False, max_tokens=32)["sizes"]
    assert [eight["bytes"], four["bytes"]] == [scored["bytes"][name] for name in ("int8", "int4")]
    assert eight["elements"] == report["sizes"]["model"]["before"]["elements"]
    stored = json.loads((tmp_path / "out" / "eckart" / "report.json").read_text())
    assert stored["baselines"] == report["baselines"]
    assert "baselines" in stored["seconds"]
    assert "original int4" in (tmp_path / "out" / "eckart" / "report.html").read_text()
    found = eckart.compare(source, methods=["svd"], keeps=[0.5], data=data, latency=False, **small).as_dict()
    assert [row["name"] for row in found["baselines"]] == ["original int8", "original int4"]
    assert found["baselines"][1]["quality"] == pytest.approx(four["quality"])
    assert "original int4" in render_report(found, "x")
