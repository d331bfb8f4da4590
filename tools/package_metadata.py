"""The page of the package on an index: README.md with links that hold there. pyproject.toml names this file as a hook.

Links of README.md lead to files of the repository. On an index they are absolute where ECKART_REPOSITORY says where the
repository is when the package is built, and the names of what they lead to where it does not; no link is left broken.

    ECKART_REPOSITORY=https://example.org/eckart make wheel
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")
COMMENT = re.compile(r"^<!--.*?-->\n+", re.M)


class ReadmeHook(MetadataHookInterface):
    """Gives the package its readme and, where the repository is known, its addresses."""

    def update(self, metadata: dict[str, Any]) -> None:
        address = os.environ.get("ECKART_REPOSITORY", "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        version = metadata["version"]
        metadata["readme"] = {"content-type": "text/markdown", "text": write_readme(text, address, version)}
        metadata["urls"] = write_addresses(address, version)


def write_readme(text: str, address: str, version: str) -> str:
    """README.md for an index."""

    def link(found: re.Match[str]) -> str:
        image, shown, target = found.groups()
        if not address:
            return "" if image else shown
        return f"{image}[{shown}]({address}/{'raw' if image else 'blob'}/v{version}/{target})"

    return LINK.sub(link, COMMENT.sub("", text))


def write_addresses(address: str, version: str) -> dict[str, str]:
    """Project URLs; none where the repository is not known."""
    if not address:
        return {}
    files = f"{address}/blob/v{version}"
    return {
        "Homepage": address,
        "Documentation": f"{files}/docs/index.md",
        "Changelog": f"{files}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
