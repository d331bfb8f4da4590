"""Write a page as one HTML file."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eckart.report.page.blocks import Page

MARK = "report of eckart"
"""What such a file says of itself near its beginning: others are never replaced."""


def render_page(page: Page, version: str) -> str:
    """The file's content. Everything that comes from a model or its data is escaped by the template.

    Args:
        page: what it says.
        version: of eckart.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    template = environment.get_template("page.html.jinja")
    sections = [section for section in page.sections if section.blocks]
    return _visible(template.render(page=page, sections=sections, version=version, mark=MARK))


def _visible(text: str) -> str:
    """Without characters that HTML does not allow, such as half a pair of UTF-16, which could not be written."""
    allowed = "\t\n\r"
    return "".join(
        sign if sign in allowed or (ord(sign) >= 32 and not 0xD800 <= ord(sign) <= 0xDFFF) else "�" for sign in text
    )
