"""Which run a journal is of: the record that is written first, compared when a run goes on, and removed last."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from eckart.errors import CheckpointError
from eckart.storage.files import TEMPORARY, disk_full, sync_folder, write_file
from eckart.storage.sealed import json_object, sealed, unsealed

logger = logging.getLogger(__name__)

RECORD = "journal.json"
FORMAT = "eckart journal"
VERSION = 1
SHOWN = 60  # characters of a value in a message


def continues(folder: Path, key: dict[str, Any], restart: bool) -> bool:
    """Whether a folder holds the run with this key; otherwise it is left without a run, or refused."""
    record = folder / RECORD
    ours = {RECORD, RECORD + TEMPORARY, "entries", "files"}
    names = {path.name for path in folder.iterdir()}
    if not names - {RECORD + TEMPORARY}:
        return False
    content = json_object(record.read_bytes()) if record.is_file() else None
    if content is None:
        # A damaged record proves nothing: on its word only what every journal holds is thrown away.
        foreign = RECORD not in names or bool(names - ours)
    else:
        foreign = content.get("format") != FORMAT
    if foreign:
        raise CheckpointError(
            f"{folder} is where the unfinished run is kept, but what is there was not made by eckart (found: "
            f"{', '.join(sorted(names)[:8])}). Move it away, or choose another --output-dir."
        )
    version = (content or {}).get("version")
    body = unsealed(record.read_bytes())
    if restart:
        logger.warning("The unfinished run in %s is thrown away.", folder)
    elif isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"{record} has format version {version}; this eckart reads up to {VERSION}. Continue with the newer "
            "eckart, or give --restart to throw the unfinished run away, or choose another --output-dir."
        )
    elif body is None or "key" not in body:
        logger.warning("%s is damaged: the run starts afresh.", record)
    elif body["key"] is not None:  # None: it was being thrown away
        if body["key"] != key:
            listed = "".join(f"\n  - {line}" for line in _differences(body["key"], key))
            raise CheckpointError(
                f"{folder} holds an unfinished run that cannot be continued by this one:{listed}\nGive the same "
                "arguments to continue it, --restart to throw the unfinished run away, or another --output-dir."
            )
        return True
    discard(folder)
    return False


def begin(folder: Path, key: dict[str, Any] | None) -> None:
    """Write the record of a run; with the key None, of one that is being thrown away."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync_folder(folder.parent)
    record = {"format": FORMAT, "version": VERSION, "key": key}
    write_file(folder / RECORD, [sealed(record)], sync=True)
    sync_folder(folder)


def discard(folder: Path) -> None:
    """Remove all but the record. It says so first: killed half-way, the rest is not taken for a run."""
    try:
        begin(folder, None)
    except OSError as error:
        if not disk_full(error):  # then removing is the way out
            raise
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != RECORD:
            path.unlink()


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{name}.")
        elif old != new or (name in before) != (name in now):
            texts = [json.dumps(side[name]) if name in side else "absent" for side in (before, now)]
            lines.append(f"{prefix}{name}: {_shown(*texts)} then, {_shown(*reversed(texts))} now")
    return lines


def _shown(text: str, other: str) -> str:
    """A value shortened to where it begins to differ from another."""
    if len(text) <= SHOWN:
        return text
    same = next(
        (i for i, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), min(len(text), len(other))
    )
    start = max(0, min(same - 10, len(text) - SHOWN))
    end = start + SHOWN
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
