"""The wheel holds every file of the package, and its page on an index no broken link. (`make wheel` installs it.)"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

pytest.importorskip("hatchling", reason="wheels are built where hatchling is: pip install hatchling")

from package_metadata import write_readme


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    from hatchling.builders.wheel import WheelBuilder

    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    with zipfile.ZipFile(built) as file:
        yield file


def metadata_of(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return wheel.read(name).decode()


def test_wheel_holds_the_model_the_templates_and_every_module(wheel):
    package = ROOT / "src"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    files = {str(path.relative_to(package)) for path in files if path.suffix != ".pyc"}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {name for name in files if not name.partition("/")[0].endswith(".egg-info")}
    assert {"eckart/demo/model/model.safetensors", "eckart/report/card.md.jinja", "eckart/py.typed"} <= held


def test_page_of_the_package_has_no_relative_link(wheel):
    page = metadata_of(wheel).partition("\n\n")[2]
    assert "# eckart" in page
    assert not re.findall(r"\]\((?!https?:)[^)]+\)", page)
    assert "<!--" not in page


def test_links_are_absolute_where_the_repository_is_known():
    text = "<!-- here: a = b -->\n\nSee [the docs](docs/start.md) and [hub](https://example.org).\n\n![x](docs/x.svg)\n"
    assert write_readme(text, "https://example.org/eckart", "1.0") == (
        "See [the docs](https://example.org/eckart/blob/v1.0/docs/start.md) and [hub](https://example.org).\n\n"
        "![x](https://example.org/eckart/raw/v1.0/docs/x.svg)\n"
    )
    assert write_readme(text, "", "1.0") == "See the docs and [hub](https://example.org).\n\n\n"


def test_addresses_are_those_of_the_repository(monkeypatch, tmp_path):
    from hatchling.metadata.core import ProjectMetadata
    from hatchling.plugin.manager import PluginManager

    def addresses():
        return ProjectMetadata(str(ROOT), PluginManager()).core.urls

    monkeypatch.delenv("ECKART_REPOSITORY", raising=False)
    assert addresses() == {}
    monkeypatch.setenv("ECKART_REPOSITORY", "https://example.org/eckart/")
    assert addresses()["Homepage"] == "https://example.org/eckart"
    assert addresses()["Changelog"].endswith("/CHANGELOG.md")
