"""The bundled corpus: the source of the Python standard library.

Every Python installation carries these files, so nothing has to be downloaded or shipped. Modules
are divided into a training and a held-out part by a hash of their name alone: the same module falls
on the same side in every Python version, on every machine.
"""

import hashlib
import os
import sysconfig
from pathlib import Path

from eckart.errors import DataError

HELD_PERCENT = 12
"""About this percentage of the modules is held out."""

SALT = "eckart-1"
"""Hashed with every name: the first salt that holds out the same part of the text as of the modules."""

MAX_BYTES = 400_000
"""Longer files are generated tables."""

SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "turtledemo",
        "__pycache__",
        "encodings",
        "pydoc_data",
    }
)
"""Third-party code, tests, and tables larger than all other modules."""


def family(module: str) -> str:
    """Return the name that decides to which part a module belongs.

    It is the first component without the prefix of a private or pure-Python version, so that a package is in one part,
    and `_pydecimal` in that of `decimal`.
    """
    first = module.partition(".")[0]
    return first.removeprefix("_py").strip("_") or first


def is_held(module: str) -> bool:
    """Whether a module belongs to the held-out part."""
    # hashlib rather than hash(): the latter changes from process to process.
    digest = hashlib.sha256(f"{SALT}:{family(module)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_PERCENT


def read_text(path: Path) -> str | None:
    """Return the text of a file, or None if it is blank, too long or not UTF-8."""
    if path.stat().st_size > MAX_BYTES:
        return None
    try:
        # Text mode turns every line ending into "\n": Windows installations give the same text.
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return text if text.strip() else None


def _module_name(relative: Path) -> str | None:
    """Return the dotted name of a file in the library folder, or None if it is not a module."""
    parts = relative.with_suffix("").parts
    if not SKIPPED_FOLDERS.isdisjoint(parts[:-1]):
        return None
    # Folders such as `config-3.11-x86_64-linux-gnu` hold build scripts, and `_sysconfigdata_*` records the
    # machine Python was built on: neither is a part of the library.
    if not all(part.isidentifier() for part in parts) or parts[0].startswith("_sysconfigdata"):
        return None
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts) or None


def documents(split: str) -> list[tuple[str, str]]:
    """Return the modules of one part of the corpus.

    Args:
        split: "train", "held", or "calibration", which is another name for "train".

    Returns:
        Pairs of module name and source text, sorted by module name.

    Raises:
        DataError: If the split is unknown, or this Python comes without the source of its library.
    """
    if split not in ("train", "calibration", "held"):
        raise DataError(f"the bundled corpus has no split {split!r}: ask for 'train', 'calibration' or 'held'")
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]  # thousands of third-party files
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            module = _module_name(path.relative_to(root))
            if module is None or is_held(module) != (split == "held"):
                continue
            text = read_text(path)
            if text is not None:
                found.append((module, text))
    if not found:
        raise DataError(f"no standard library source found in {root}: pass your own text with --data")
    return sorted(found)
