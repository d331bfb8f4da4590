"""The HTML report in headless Chromium: on a phone and a wide screen, light and dark, by keyboard, and by axe.

Skipped where playwright or Chromium is not installed. `CHROMIUM` may name the browser.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import contextmanager

import pytest
import reports

from eckart.report.page.pages import render_report
from eckart.report.page.spectra import Spectrum

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'eckart[test]'"
)
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
PHONE, WIDE = 400, 1400
OPEN = "document.querySelectorAll('details').forEach(each => each.open = true)"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: `CHROMIUM`, one on the path, or playwright's own."""
    found = os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        try:
            launched = started.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as error:
            if found is not None:
                raise
            pytest.skip(f"no Chromium: install one, or name it in CHROMIUM ({str(error).splitlines()[0]})")
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """The address of the page of every command."""
    home = tmp_path_factory.mktemp("pages")
    pages = {name: render_report(make(), f"{name} {reports.NASTY}") for name, make in reports.ALL.items()}
    spectrum = Spectrum("model.layers.0.q_proj", "lowrank", 4, [5.0, 2.0, 1.0, 0.5, *[0.0] * 12], [1.0, 0.5, 0.2])
    pages["compression"] = render_report(
        reports.compression(), "a-long-name-" * 8, loading="import eckart\n" + "model = load('x')  # " + "long " * 40,
        again="eckart compress", scores=reports.scores(), spectra=[spectrum],
    )  # fmt: skip
    for name, text in pages.items():
        (home / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: (home / f"{name}.html").as_uri() for name in pages}


@contextmanager
def opened(browser, address, width, scheme="light", **more):
    """A page as a person with that screen sees it, and whatever the browser says of it."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **more)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url != address else None)
    page.goto(address)
    try:
        yield page, said
    finally:
        context.close()


@pytest.mark.parametrize("name", reports.ALL)
@pytest.mark.parametrize("width", [PHONE, WIDE])
def test_page_fits_every_picture_shows_and_nothing_is_asked_for(browser, files, name, width):
    with opened(browser, files[name], width) as (page, said):
        page.evaluate(OPEN)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        pictures = page.locator("svg[role=img], table.heat")
        assert pictures.count() >= {"compression": 8, "comparison": 2, "bench": 2, "scores": 1, "tuning": 1}[name]
        for place in range(pictures.count()):
            picture = pictures.nth(place)
            assert picture.is_visible()
            box = picture.bounding_box()
            assert box["width"] > 100
            assert box["height"] > 30
        # Marks, bars and words of a picture lie on the screen, and so on the page.
        outside = page.evaluate(
            """width => [...document.querySelectorAll('svg[role=img] :is(text, rect, circle, path)')]
                .map(each => [each.getBoundingClientRect(), each.textContent])
                .filter(([box]) => box.left < 0 || box.right > width)
                .map(([box, words]) => [words, box.left, box.right])""",
            width,
        )
        assert outside == []
        small = page.evaluate(
            """[...document.querySelectorAll('body *')].filter(each => each.checkVisibility() && each.textContent.trim()
                && !['STYLE', 'TITLE', 'HEAD'].includes(each.tagName)
                && parseFloat(getComputedStyle(each).fontSize) < 11.5).map(each => each.outerHTML.slice(0, 80))"""
        )
        assert small == []
        assert said == []


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("compression", PHONE, "light"), ("compression", WIDE, "dark"), ("comparison", WIDE, "dark"),
     ("bench", WIDE, "light"), ("tuning", PHONE, "dark"), ("scores", PHONE, "light")],
)  # fmt: skip
def test_axe_finds_nothing(browser, files, name, width, scheme):
    with opened(browser, files[name], width, scheme, bypass_csp=True) as (page, _):
        page.evaluate(OPEN)
        assert describe(axe.Axe().run(page)) == []


def test_axe_would_find_something(browser, files):
    with opened(browser, files["tuning"], WIDE, bypass_csp=True) as (page, _):
        page.evaluate("document.documentElement.lang = ''; document.querySelector('th').textContent = ''")
        page.add_style_tag(content="p { color: #aaa !important }")
        found = {each[0] for each in describe(axe.Axe().run(page))}
        assert {"html-has-lang", "color-contrast"} <= found


def describe(results) -> list[tuple]:
    return [
        (rule["id"], node["html"][:200], node.get("failureSummary"))
        for rule in results.response["violations"]
        for node in rule["nodes"]
    ]


def test_dark_is_dark(browser, files):
    def brightness(scheme: str) -> list[float]:
        with opened(browser, files["compression"], WIDE, scheme) as (page, _):
            colors = page.evaluate(
                """[['body', 'backgroundColor'], ['section', 'backgroundColor'], ['h1', 'color'], ['text', 'fill']]
                    .map(([name, key]) => getComputedStyle(document.querySelector(name))[key])"""
            )
        return [sum(map(int, re.findall(r"\d+", color)[:3])) / 765 for color in colors]

    assert brightness("light")[:2] > [0.9, 0.9]
    assert max(brightness("light")[2:]) < 0.5
    assert max(brightness("dark")[:2]) < 0.2
    assert min(brightness("dark")[2:]) > 0.5


def test_everything_is_reached_by_keyboard(browser, files):
    with opened(browser, files["compression"], WIDE) as (page, said):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
        box = page.locator(".skip").bounding_box()
        assert box["x"] >= 0
        assert box["y"] >= 0
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "content"
        wanted = page.locator("main :is(a, summary, pre, .scroll)").evaluate_all(
            "all => all.filter(each => each.checkVisibility()).length"
        )
        reached = 0
        for _ in range(3 * wanted):
            page.keyboard.press("Tab")
            inside = page.evaluate("document.activeElement.closest('main') != null && document.activeElement.tagName")
            if not inside:
                break
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            reached += 1
            if inside == "SUMMARY" and reached < 4:
                page.keyboard.press("Enter")
                assert page.evaluate("document.activeElement.parentElement.open")
                page.keyboard.press("Enter")
                assert not page.evaluate("document.activeElement.parentElement.open")
        assert reached == wanted
        assert said == []
