"""The key of a run: everything that its numbers depend on. A journal is continued only under the same key."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from eckart.errors import CheckpointError
from eckart.storage.files import TEMPORARY, disk_full, sync_folder, write_file

logger = logging.getLogger(__name__)

KEY_FILE = "journal.json"
FORMAT = "eckart journal"
VERSION = 2
PARTS = ("entries", "files")
SHOWN = 60  # characters of a value in a message


def is_continued(folder: Path, key: dict[str, Any], restart: bool) -> bool:
    """Whether a folder holds the run with this key; if not, it is emptied, or refused."""
    file = folder / KEY_FILE
    ours = {KEY_FILE, KEY_FILE + TEMPORARY, *PARTS}
    names = {path.name for path in folder.iterdir()}
    if not names - {KEY_FILE + TEMPORARY}:
        return False
    content = _json_object(file.read_bytes()) if file.is_file() else None
    # A damaged file proves nothing: on its word, only a folder that holds nothing else than a journal is emptied.
    foreign = KEY_FILE not in names or bool(names - ours) if content is None else content.get("format") != FORMAT
    if foreign:
        raise CheckpointError(
            f"{folder} is where the unfinished run is kept, but what is there was not made by eckart (found: "
            f"{', '.join(sorted(names)[:8])}). Move it away, or choose another --output-dir."
        )
    content = content or {}
    version = content.get("version")
    if restart:
        logger.warning("The unfinished run in %s is discarded.", folder)
    elif isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"{file} has format version {version}; this eckart reads up to {VERSION}. Continue with the newer "
            "eckart, or give --restart to discard the unfinished run, or choose another --output-dir."
        )
    elif version != VERSION or "key" not in content:
        what = "is of an older eckart" if isinstance(version, int) and version < VERSION else "is damaged"
        logger.warning("%s %s: the run starts from the beginning.", file, what)
    elif content["key"] is not None:  # None: it was being discarded
        if content["key"] != key:
            before = content["key"] if isinstance(content["key"], dict) else {}
            listed = "".join(f"\n  - {line}" for line in _differences(before, key))
            raise CheckpointError(
                f"{folder} holds an unfinished run that cannot be continued by this one:{listed}\nGive the same "
                "arguments to continue it, --restart to discard the unfinished run, or another --output-dir."
            )
        return True
    discard(folder)
    return False


def is_journal(folder: Path) -> bool:
    """Whether a folder is a journal of eckart and holds nothing else."""
    file = folder / KEY_FILE
    if not file.is_file() or {path.name for path in folder.iterdir()} - {KEY_FILE, KEY_FILE + TEMPORARY, *PARTS}:
        return False
    return (_json_object(file.read_bytes()) or {}).get("format") == FORMAT


def begin(folder: Path, key: dict[str, Any] | None) -> None:
    """Write the key of a run; None for one that is being discarded."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync_folder(folder.parent)
    content = {"format": FORMAT, "version": VERSION, "key": key}
    write_file(folder / KEY_FILE, [json.dumps(content).encode()], sync=True)
    sync_folder(folder)


def discard(folder: Path) -> None:
    """Remove all but the key file, which says so first: killed half-way, the rest is not taken for a run."""
    try:
        begin(folder, None)
    except OSError as error:
        if not disk_full(error):  # then removing is the way out
            raise
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != KEY_FILE:
            path.unlink()


def _json_object(raw: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{name}.")
        elif old != new or (name in before) != (name in now):
            texts = [json.dumps(side[name]) if name in side else "absent" for side in (before, now)]
            lines.append(f"{prefix}{name}: {_shorten(*texts)} then, {_shorten(*reversed(texts))} now")
    return lines


def _shorten(text: str, other: str) -> str:
    """The part of a value around where it begins to differ from another one."""
    if len(text) <= SHOWN:
        return text
    same = next(
        (i for i, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), min(len(text), len(other))
    )
    start = max(0, min(same - 10, len(text) - SHOWN))
    end = start + SHOWN
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
